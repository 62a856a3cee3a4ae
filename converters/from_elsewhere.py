"""Adapters that other programs wrote: whether their tensors are LoRAs of the linear layers of a base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edgelora.base.model import Base
from edgelora.errors import AdapterError, some
from edgelora.peft.kinds import LARGEST_NUMBER
from edgelora.peft.lora_config import StoredPair
from edgelora.peft.strangers import no_linear


def part_faults(places: Mapping[str, Mapping[str, str]], wanted: Sequence[str], base: Base) -> list[str]:
    """What the tensors say by their names alone: modules that are no linear layers, parts missing and parts too many.

    places: the names of the tensors by module and part.
    """
    faults = []
    for module, parts in places.items():
        missing, others = [part for part in wanted if part not in parts], [part for part in parts if part not in wanted]
        if module not in base.linears:
            faults.append(no_linear(module))
        elif missing:
            faults.append(f"{module}: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
        faults += [f"{module}: {part} is not said of it in its settings" for part in others if not missing]
    return faults


def complete(places: Mapping[str, Mapping[str, str]], wanted: Sequence[str], base: Base) -> dict[str, dict[str, str]]:
    """Of the linear layers that have all the parts: what `part_faults` says nothing more of than parts too many."""
    return {
        module: {part: parts[part] for part in wanted}
        for module, parts in places.items()
        if module in base.linears and all(part in parts for part in wanted)
    }


def fit_faults(module: str, pair: StoredPair, shape: tuple[int, int]) -> list[str]:
    """What keeps `pair` from being a LoRA of a layer of this shape (d_out, d_in)."""
    (d_out, d_in), a, b, lengths = shape, pair.a, pair.b, pair.magnitude
    rank = a.shape[0] if a.ndim == 2 else 0
    faults = []
    if not rank or a.shape != (rank, d_in) or b.shape != (d_out, rank):
        faults.append(f"{module}: A is {a.shape} and B {b.shape}, expected (r, {d_in}) and ({d_out}, r)")
    if lengths is not None and lengths.shape != (d_out,):
        faults.append(f"{module}: its lengths are {lengths.shape}, expected ({d_out},)")
    if not all(np.isfinite(part).all() for part in pair.tensors().values()):
        faults.append(f"{module}: it holds NaN or infinite values")
    if not (np.isfinite(pair.alpha) and abs(pair.alpha) <= LARGEST_NUMBER):
        faults.append(f"{module}: α is {pair.alpha}")
    return faults


def require_none(path: Path, faults: Sequence[str], base: Base) -> None:
    """Raise AdapterError that names all `faults` of the adapter at `path`."""
    if faults:
        raise AdapterError(
            what=f"{path}: {some(faults)}",
            why=f"what is imported has to be a LoRA or DoRA of the linear layers of {base.path.name}, all of it: "
            "without a part it would compute something else",
            fix="pass the base it was trained on; if that is this one, merge it there with the program that wrote it "
            "and convert the result",
        )


def fitting(
    path: Path, pairs: Mapping[str, StoredPair], base: Base, faults: Sequence[str] = ()
) -> dict[str, StoredPair]:
    """The pairs, each of a linear layer of the base, its embedding or its head, in the base's order.

    Raises AdapterError with all that is wrong with them, and with the `faults` that were found before.
    """
    found, shapes = [*faults], {**base.linears, **base.vocabularies}
    for module, pair in pairs.items():
        found += fit_faults(module, pair, shapes[module])
    require_none(path, found if pairs or found else ["it holds no LoRA"], base)
    return {module: pairs[module] for module in shapes if module in pairs}
