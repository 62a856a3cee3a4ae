"""What a study of the ways to a quantized fine-tune says of a level, as a line of advice. Text alone, no figure.

docs/which-way.md has the figures, of one small model: what it says is a reason to measure a way, not to skip that.
"""

from __future__ import annotations

from collections.abc import Collection

STUDY = "docs/which-way.md"
COARSE = ("Q2_", "Q3_", "IQ1_", "IQ2_", "IQ3_", "TQ1_", "TQ2_")  # below 4 bits a weight
EXACT = ("Q8_0", "F16", "BF16", "F32")


def advice(quant: str, measured: Collection[str]) -> str | None:
    """A way that is worth a trial at this level and was not measured; None where there is none.

    measured: the ways that were, by their names in WAYS (edgelora/evaluate/cells.py).
    """
    if quant.upper() in EXACT or "trained" in measured:
        return None
    if quant.upper().startswith(COARSE):
        return (
            f"Below 4 bits it matters most what an adapter is trained over. One trained over the {quant} file itself, "
            f"live over it, was not measured: `edgelora train` takes that file as its base ({STUDY})."
        )
    return (
        f"An adapter trained over the {quant} file itself and run live over it was not measured; what that is worth "
        f"shrinks with every bit ({STUDY})."
    )
