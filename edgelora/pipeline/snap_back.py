"""Whether a merge can lose what its adapters learned: weights that lie on a coarse grid snap back to it.

An adapter moves weights by less than a step of a low-bit type. Where the base's weights are that type's own values,
quantizing their sum with the adapter again rounds most of them to where they were: at Q4_0 a loss of 1.688 nats became
1.960 (DESIGN section 3). Over the 16-bit original the sums lie anywhere between the steps, and the change survives.
An F16 merge over such weights keeps all, and says in its metadata what quantizing it later would lose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gguf.constants import GGMLQuantizationType

from converters.merge import Part
from edgelora.base.model import FLOAT_QUANTS, Base
from edgelora.files.contract import SAME_WEIGHTS, Contract
from edgelora.invocation import command
from edgelora.peft.adapter import Adapter
from edgelora.peft.of_weight import InPlaceOf

FINE = (*FLOAT_QUANTS, "Q8_0")  # their steps are finer than what an adapter changes

GRID_KEY = "edgelora.grid"  # of a merge in FINE numbers: the coarse type near whose steps its weights lie


def snap_back_notes(base: Base, parts: Sequence[Part], types: Mapping[str, GGMLQuantizationType]) -> list[str]:
    """What to know before such a merge is used, and both ways around it; empty where nothing is lost.

    types: of every tensor of the result.
    """
    parts = [part for part in parts if part.scale]
    touched = {base.tensor_of(module) for part in parts for module in part.adapter.tensors}
    coarse = sorted({types[name].name for name in touched if types[name].name not in FINE})
    live = not any(_changes_as_a_whole(part.adapter) for part in parts)
    if not coarse:
        return _later(grid_of(base, parts), live) if touched else []
    into, notes, instead = ", ".join(coarse), [], _instead(base, live)
    for part in parts:
        contract = part.adapter.contract
        if contract is None or contract.base_file.quant in FINE or not _same_weights(contract, base):
            continue
        dequantized = f", dequantized to {base.quant}" if base.quant in FINE else ""
        notes.append(
            f"{part.name} was trained over {contract.base_file.name} ({contract.base_file.quant}), and these are that "
            f"file's weights{dequantized}: merged and quantized to {into} they snap back to the old steps, which can "
            f"undo what it learned. {instead}"
        )
    if not notes and base.quant not in FINE:
        notes.append(
            f"the base is {base.quant} already: merged and quantized again to {into}, its weights tend to snap back to "
            f"the old steps, which can undo what the adapter learned. {instead}"
        )
    return notes or notes_on_grid(base, types)


def notes_on_grid(base: Base, types: Mapping[str, GGMLQuantizationType]) -> list[str]:
    """What to know before a GGUF is quantized to `types` that an earlier merge left near the steps of a coarse type."""
    coarse = sorted({kind.name for kind in types.values() if kind.name not in FINE})
    grid = _stated_grid(base)
    if grid is None or base.quant not in FINE or not coarse:
        return []
    return [
        f"an adapter was merged into {base.path.name} over weights that had been {grid}: quantized to "
        f"{', '.join(coarse)} they snap back to the old steps, which can undo what it learned. Run the adapter live "
        f"over the {grid} file instead, or merge it into the 16-bit original of the base and quantize that; Q8_0 keeps "
        f"it too"
    ]


def grid_of(base: Base, parts: Sequence[Part]) -> str | None:
    """The coarse type on or near whose steps the base's weights lie, as far as it and its adapters' contracts tell."""
    if base.quant not in FINE:
        return base.quant
    contracts = (part.adapter.contract for part in parts)
    trained_over = (c.base_file.quant for c in contracts if c is not None and _same_weights(c, base))
    return next((quant for quant in trained_over if quant not in FINE), None) or _stated_grid(base)


def _stated_grid(base: Base) -> str | None:
    value = base.file.metadata.get(GRID_KEY) if base.is_gguf else None
    return value.data if value is not None and isinstance(value.data, str) and value.data.isidentifier() else None


def _later(grid: str | None, live: bool) -> list[str]:
    """What not to do with a merge in fine numbers."""
    if grid is None:
        return []
    beside = f"run the adapter live over the {grid} file, or " if live else ""
    return [
        f"these weights were {grid}, and still lie near its steps: this file keeps what the adapter learned, but "
        f"quantize it below 8 bits and they return to them. For a small file, {beside}merge it into the 16-bit "
        f"original of the base and quantize that"
    ]


def _same_weights(contract: Contract, base: Base) -> bool:
    """Whether the base's weights are those that the adapter was trained over, whatever they are stored as now."""
    distance = contract.base.distance(base.fingerprint)
    return distance is not None and distance <= SAME_WEIGHTS


def _changes_as_a_whole(adapter: Adapter) -> bool:
    """Whether it changes weights in a way that neither a LoRA nor a patched base holds."""
    changes = (adapter.change(module).whole for module in (*adapter.linears, *adapter.vocabularies))
    return any(whole is not None and not isinstance(whole, InPlaceOf) for whole in changes)


def _instead(base: Base, live: bool) -> str:
    """What to do in the place of such a merge. live: whether the adapters can run over the base as it is."""
    keeps = "F16 and Q8_0 results of this merge keep it too"
    if not live:
        return f"Merge it into the 16-bit original of the base; {keeps}"
    over = command("export", base.path, Path("ADAPTER"), "--out", "ADAPTER.gguf")
    return f"Run it live over this base instead ({over}), or merge it into the 16-bit original of the base; {keeps}"
