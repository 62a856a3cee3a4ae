"""How frozen weights are held while training: THE TABLE of ways, and one function that takes a stored matrix there."""

from __future__ import annotations

import mmap

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from edgelora.architectures.names import tensor_shapes
from edgelora.base import ggml
from edgelora.base.model import Base
from edgelora.base.nf4 import quantize_nf4
from edgelora.base.tensors import Stored
from edgelora.base.weights import Dense, GGUFBlocks, from_rows
from edgelora.device import Choice
from edgelora.errors import ConfigError
from edgelora.kernels import load
from edgelora.nn.linear import Weight

Type = GGMLQuantizationType

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BLOCKS = {kind.name.lower(): kind for kind in (
    Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K,
    Type.IQ4_NL, Type.IQ4_XS,
)}  # fmt: skip

# As llama-quantize: what a type becomes where rows do not divide into its blocks of 256.
FALLBACK = {
    Type.Q2_K: Type.Q4_0, Type.Q3_K: Type.Q4_0, Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0,
    Type.IQ4_XS: Type.IQ4_NL,
}  # fmt: skip

# `--base-dtype` besides `auto`: as stored, 4-bit NormalFloat, floats, or quantized on opening to a GGUF type.
BASE_FORMATS = ("blocks", "nf4", *FLOATS, *BLOCKS)


# Types whose blocks cost a training step a tenth more than dense floats where ggml alone reads them. Through
# edgelora's own kernels Q6_K costs 3 % (benchmarks/step.py).
SLOW = frozenset({"Q2_K", "Q3_K", "Q6_K"})
DENSE_SHARE = 0.1  # of the free memory that a dense copy may take


def choose_base_dtype(asked: str, base: Base, free_bytes: int | None, compute: str = "f32") -> Choice:
    """How to hold the weights of `base`: as asked, or for `auto` what is fastest in the memory there is.

    compute: the format of products, `f32` or `bf16`, which dense weights would have too.
    """
    if asked != "auto":
        return Choice(asked, f"asked for; the base stores {base.quant}")
    sizes: dict[Type, int] = {}
    for name, shape in tensor_shapes(base.architecture, base.config).items():
        if len(shape) == 2 and name.startswith("model.layers."):
            kind = base.tensors.kind(name)
            sizes[kind] = sizes.get(kind, 0) + shape[0] * shape[1]
    weights = sum(sizes.values())
    slow = 0 if load.library() is not None else sum(n for kind, n in sizes.items() if kind.name in SLOW)
    dense, free = FLOATS[compute].itemsize * weights, free_bytes or 0
    if 2 * slow > weights and dense <= DENSE_SHARE * free:
        return Choice(
            compute, f"{dense / 1e6:.0f} MB of {free / 1e9:.0f} GB free, and faster than {base.quant} each time"
        )
    if not base.is_gguf and sum(n * GGML_QUANT_SIZES[kind][1] for kind, n in sizes.items()) > free / 2 > 0:
        return Choice("q4_k", "the checkpoint is too large for this memory; on a CPU faster and more exact than NF4")
    return Choice("blocks", f"training sees the very {base.quant} weights that are stored, in their size")


def hold(stored: Stored, how: str) -> Weight:
    """The weight that keeps `stored` as `how`, one of BASE_FORMATS. Raises ConfigError for any other."""
    if how == "blocks":
        return from_rows(stored.rows, stored.kind, stored.columns)
    try:
        return _converted(stored, how)
    finally:
        _let_go(stored.rows)


def _converted(stored: Stored, how: str) -> Weight:
    if how == "nf4":
        mapped = from_rows(stored.rows, stored.kind, stored.columns)
        return quantize_nf4(mapped.values if isinstance(mapped, Dense) else mapped.dequantize())
    if how in FLOATS:
        return Dense(_floats(stored, FLOATS[how]))
    if how not in BLOCKS:
        raise ConfigError(
            what=f"{how}: no such way to hold a base's weights",
            why=f"there are {', '.join(('auto', *BASE_FORMATS))}",
            fix="choose one of these with --base-dtype",
        )
    kind = BLOCKS[how]
    if stored.columns % GGML_QUANT_SIZES[kind][0]:
        kind = FALLBACK.get(kind, kind)
    if stored.columns % GGML_QUANT_SIZES[kind][0]:
        return Dense(_floats(stored, torch.float16))
    if stored.kind == kind:
        return from_rows(stored.rows, kind, stored.columns)
    return GGUFBlocks(ggml.requantize(stored.rows, stored.kind, stored.columns, kind), kind, stored.columns)


def _let_go(rows: np.ndarray) -> None:
    """Tell the system that these pages of a mapped file will hardly be read again: they count as this process's memory.

    A page that is read after all comes back from the file.
    """
    mapped: object = rows
    while isinstance(mapped, np.ndarray | memoryview):
        mapped = mapped.base if isinstance(mapped, np.ndarray) else mapped.obj
    if not isinstance(mapped, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return  # a copy, as of rotary rows, or a system without such advice
    begin = rows.ctypes.data - np.frombuffer(mapped, np.uint8).ctypes.data
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only: the others are also a neighbour's
    if (length := (begin + rows.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first) > 0:
        mapped.madvise(mmap.MADV_DONTNEED, first, length)


def _floats(stored: Stored, dtype: torch.dtype) -> torch.Tensor:
    """Dense values in memory of their own."""
    mapped = from_rows(stored.rows, stored.kind, stored.columns)
    return mapped.dequantize().to(dtype, copy=True)
