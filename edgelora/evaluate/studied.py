"""What a study of the ways to a quantized fine-tune says of a level, as a line of advice. Text alone, no figure.

docs/which-way.md has the figures, of one small model: what it says is a reason to measure a way, not to skip that.
"""

from __future__ import annotations

from collections.abc import Collection

STUDY = "docs/which-way.md"
TWO_BITS = ("Q2_", "IQ1_", "IQ2_", "TQ1_", "TQ2_")  # or fewer a weight
COARSE = (*TWO_BITS, "Q3_", "IQ3_")  # below 4 bits; from there on no way was clearly better than another


def advice(quant: str, measured: Collection[str]) -> str | None:
    """A way that is worth a trial at this level and was not measured; None where there is none.

    measured: the ways that were, by their names in WAYS (edgelora/evaluate/cells.py).
    """
    level = quant.upper()
    if not level.startswith(COARSE) or "trained" in measured:
        return None
    said = (
        f"Below 4 bits it matters most what an adapter is trained over. One trained over the {quant} file itself, "
        f"live over it, was not measured: `edgelora train` takes that file as its base ({STUDY})."
    )
    if level.startswith(TWO_BITS) and "merged" in measured and "imatrix" not in measured:
        said += " Merged with the task's importance matrix (`--ways imatrix`) comes next."
    return said
