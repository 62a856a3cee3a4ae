"""Adapters that other programs wrote: which of their tensors can be a LoRA here, and what is said of the others."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edgelora.base.model import Base
from edgelora.errors import AdapterError
from edgelora.peft.lora_config import StoredPair

SHOWN = 8
LARGEST_ALPHA = 1e30  # beyond any that float32 could still multiply by

# What a tensor is that belongs to no linear layer of the decoder, by a part of its name. The first that fits.
NO_LINEAR = (
    (r"experts|_exps\b|switch_mlp|shared_expert", "of the experts of a mixture, which stay as they are here"),
    (r"block_sparse_moe\.gate|mlp\.gate(\.|$)|ffn_gate_inp", "of a mixture's router, which stays as it is here"),
    (r"embed_tokens|embedding|token_embd|\bwte\b", "of the token embeddings"),
    (r"lm_head|^output\.", "of the head"),
    (r"norm", "of a norm"),
    (r"modules_to_save|original_module|base_layer", "a module that was trained as a whole"),
    (r"vision|visual|audio|multi_modal", "of the part of the model that sees or hears"),
    (r"bias", "a bias"),
)


def no_linear(name: str) -> str:
    """What is said of a tensor or module that is no linear layer's."""
    found = next((what for pattern, what in NO_LINEAR if re.search(pattern, name)), None)
    return f"{name} is {found}" if found else f"{name} belongs to no linear layer of this model"


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
    if not (np.isfinite(pair.alpha) and abs(pair.alpha) <= LARGEST_ALPHA):
        faults.append(f"{module}: α is {pair.alpha}")
    return faults


def require_none(path: Path, faults: Sequence[str], base: Base) -> None:
    """Raise AdapterError that names all `faults` of the adapter at `path`."""
    if faults:
        more = f" and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise AdapterError(
            what=f"{path}: {'; '.join(faults[:SHOWN])}{more}",
            why=f"what is imported has to be a LoRA or DoRA of the linear layers of {base.path.name}, all of it: "
            "without a part it would compute something else",
            fix="pass the base it was trained on; if that is this one, merge it there with the program that wrote it "
            "and convert the result",
        )


def fitting(path: Path, pairs: Mapping[str, StoredPair], base: Base) -> dict[str, StoredPair]:
    """The pairs in the order of the base's layers. Raises AdapterError with all that is wrong with them."""
    faults = [] if pairs else ["it holds no LoRA"]
    for module, pair in pairs.items():
        shape = base.linears.get(module)
        faults += [no_linear(module)] if shape is None else fit_faults(module, pair, shape)
    require_none(path, faults, base)
    return {module: pairs[module] for module in base.linears if module in pairs}
