"""The numbers of a LoRA's two matrices in a GGUF: F32, F16, or Q8_0 where their rows can be. Imports no torch."""

from __future__ import annotations

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from edgelora.base import ggml
from edgelora.errors import ConfigError, ExportError

Type = GGMLQuantizationType

PAIR_TYPES = {kind.name: kind for kind in (Type.F32, Type.F16, Type.Q8_0)}
_LARGEST = {Type.F32: float(np.finfo(np.float32).max), Type.F16: float(np.finfo(np.float16).max)}
LARGEST = {**_LARGEST, Type.Q8_0: 127 * _LARGEST[Type.F16]}  # a scale, which is an F16, times whole numbers


def pair_type(name: str) -> Type:
    """`f16` → F16. Raises ConfigError for what no adapter file holds."""
    if name.upper() not in PAIR_TYPES:
        raise ConfigError(
            what=f"--type {name}",
            why=f"an adapter file holds {', '.join(PAIR_TYPES)} numbers",
            fix="pass --type F16",
        )
    return PAIR_TYPES[name.upper()]


def stored_as(columns: int, asked: Type) -> Type:
    """What a matrix with rows of so many numbers is stored as: Q8_0's blocks are 32 numbers of a row, else it is F16.

    A (r, d_in) of almost every model has such rows; B (d_out, r) where the rank is a multiple of 32.
    """
    return Type.F16 if columns % GGML_QUANT_SIZES[asked][0] else asked


def stored(values: np.ndarray, asked: Type, tensor: str) -> tuple[np.ndarray, Type]:
    """A matrix as `GGUFWriter.add_tensor` takes it, and its type. Raises ExportError, naming the tensor, if a value
    does not fit."""
    kind = stored_as(values.shape[1], asked)
    largest = float(np.abs(values).max())
    if not largest <= LARGEST[kind]:
        raise ExportError(
            what=f"{tensor}: a value of the adapter does not fit into {kind.name}",
            why=f"the largest is {largest:.3g}, {kind.name} ends at {LARGEST[kind]:.3g}",
            fix="export with --type F32",
        )
    if kind == Type.Q8_0:
        return ggml.quantize(np.ascontiguousarray(values, np.float32), kind), kind
    return np.ascontiguousarray(values, np.float16 if kind == Type.F16 else np.float32), kind
