"""How PEFT stores a VeRA: two vectors for each module, and one pair of matrices for all of them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgelora.files.safetensors import SafetensorsFile

Parts = Mapping[str, np.ndarray]

OWN = ("vera_lambda_b", "vera_lambda_d")
SHARED = ("vera_A", "vera_B")
SHARED_PREFIX, PREFIX = "base_model.", "base_model.model."


def factors_of(parts: Parts) -> tuple[np.ndarray, np.ndarray]:
    """diag(d) A (r, d_in) and diag(b) B (d_out, r): the module's change is their product."""
    return parts["vera_lambda_d"][:, None] * parts["vera_A"], parts["vera_lambda_b"][:, None] * parts["vera_B"]


def flat(tensors: Mapping[str, Parts]) -> dict[str, np.ndarray]:
    """By PEFT's names. Every module's A and B are the first columns and rows of the largest."""
    shared = {name: max((parts[name] for parts in tensors.values()), key=np.size) for name in SHARED}
    own = {f"{PREFIX}{module}.{name}": parts[name] for module, parts in tensors.items() for name in OWN}
    return own | {f"{SHARED_PREFIX}{name}": value for name, value in shared.items()}


def read(
    file: SafetensorsFile, linears: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """Each module's vectors, and views of the matrices that it takes its rows and columns from; and every fault."""
    found = {name: file.floats(name) for name in file.tensors}
    shared = [found.pop(f"{SHARED_PREFIX}{name}", None) for name in SHARED]
    a, b = shared
    if a is None or b is None or a.ndim != 2 or b.ndim != 2:
        return {}, [f"{' and '.join(SHARED)} are not two matrices (it was saved with save_projection=False?)"]
    places: dict[str, dict[str, np.ndarray]] = {}
    faults = [] if found else ["it holds no VeRA tensors"]
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        faults.append("vera_A or vera_B holds NaN or infinite values")
    for name, value in found.items():
        module, _, part = name.removeprefix(PREFIX).rpartition(".")
        if part not in OWN or not name.startswith(PREFIX):
            faults.append(f"{name} is no part of a VeRA")
        else:
            places.setdefault(module, {})[part] = value
    for module, parts in places.items():
        if module not in linears:
            faults.append(f"{module} is no linear layer of this model")
            continue
        d_out, d_in = linears[module]
        parts["vera_A"], parts["vera_B"] = a[:, :d_in], b[:d_out]
        faults += [f"{module}: {fault}" for fault in _faults(parts, d_out, d_in)]
    return places, faults


def _faults(parts: Parts, d_out: int, d_in: int) -> Sequence[str]:
    if missing := [name for name in OWN if name not in parts]:
        return [f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"]
    rank, faults = len(parts["vera_A"]), []
    wanted = {"vera_lambda_b": (d_out,), "vera_lambda_d": (rank,), "vera_A": (rank, d_in), "vera_B": (d_out, rank)}
    for name, shape in wanted.items():
        if parts[name].shape != shape:
            faults.append(f"{name} is {parts[name].shape}, expected {shape}")
    if not all(np.isfinite(parts[name]).all() for name in OWN):
        faults.append("it holds NaN or infinite values")
    return faults
