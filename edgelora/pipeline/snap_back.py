"""Whether a merge can lose what its adapters learned: weights that lie on a coarse grid snap back to it.

An adapter moves weights by less than a step of a low-bit type. Where the base's weights are that type's own values,
quantizing their sum with the adapter again rounds most of them to where they were: at Q4_0 a loss of 1.688 nats became
1.960 (DESIGN section 3). Over the 16-bit original the sums lie anywhere between the steps, and the change survives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType

from converters.merge import Part
from edgelora.base.model import Base
from edgelora.files.contract import Contract
from edgelora.invocation import command

FINE = ("F32", "F16", "BF16", "Q8_0")  # their steps are finer than what an adapter changes

# Row norms of the same weights, stored as F16 or BF16 instead of blocks, differ by 1e-4 (root mean square); those of an
# original and its quantization to 4 bits by 1e-3 and more.
SAME_WEIGHTS = 5e-4


def snap_back_notes(base: Base, parts: Sequence[Part], types: Mapping[str, GGMLQuantizationType]) -> list[str]:
    """What to know before such a merge is used, and both ways around it; empty where nothing is lost.

    types: of every tensor of the result.
    """
    parts = [part for part in parts if part.scale]
    touched = {base.tensor_of(module) for part in parts for module in part.adapter.tensors}
    coarse = sorted({types[name].name for name in touched if types[name].name not in FINE})
    if not coarse:
        return []
    into, notes = ", ".join(coarse), []
    for part in parts:
        contract = part.adapter.contract
        if contract is None or contract.base_file.quant in FINE or not _same_weights(contract, base):
            continue
        dequantized = f", dequantized to {base.quant}" if base.quant in FINE else ""
        notes.append(
            f"{part.name} was trained over {contract.base_file.name} ({contract.base_file.quant}), and these are that "
            f"file's weights{dequantized}: merged and quantized to {into} they snap back to the old steps, which can "
            f"undo what it learned. {_instead(base)}"
        )
    if not notes and base.quant not in FINE:
        notes.append(
            f"the base is {base.quant} already: merged and quantized again to {into}, its weights tend to snap back to "
            f"the old steps, which can undo what the adapter learned. {_instead(base)}"
        )
    return notes


def _same_weights(contract: Contract, base: Base) -> bool:
    """Whether the base's weights are those that the adapter was trained over, whatever they are stored as now."""
    ours, theirs = base.fingerprint.row_norms(), contract.base.row_norms()
    if ours.shape != theirs.shape:
        return False
    return float(np.sqrt(np.mean(np.square((ours - theirs) / np.maximum(np.abs(theirs), 1e-3))))) <= SAME_WEIGHTS


def _instead(base: Base) -> str:
    live = command("export", base.path, Path("ADAPTER"), "--out", "ADAPTER.gguf")
    return (
        f"Run it live over this base instead ({live}), or merge it into the 16-bit original of the base; F16 and Q8_0 "
        f"results of this merge keep it too"
    )
