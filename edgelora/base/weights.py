"""Frozen weights as they are stored: `Dense` floats or `GGUFBlocks`, dequantized on use into one reused buffer."""

from __future__ import annotations

import threading
import warnings

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from edgelora.base import ggml

DENSE = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}

_scratch = threading.local()


def scratch(n_rows: int, columns: int) -> Tensor:
    """float32 (n_rows, columns) in this thread's buffer; fresh memory would cost a page fault every 4 KiB each time."""
    buffer: Tensor | None = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.numel() < n_rows * columns:
        buffer = _scratch.buffer = torch.empty(n_rows * columns)
    return buffer[: n_rows * columns].view(n_rows, columns)


class Dense:
    """A weight kept as floats, (d_out, d_in), memory-mapped until used."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.shape = (values.shape[0], values.shape[1])
        self.size_bytes = values.numel() * values.element_size()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.values.dtype == dtype:
            return self.values
        if dtype != torch.float32:
            return self.values.to(dtype)
        return scratch(*self.shape).copy_(self.values)

    def rows(self, first: int, last: int) -> Tensor:
        part = self.values[first:last]
        return part if part.dtype == torch.float32 else scratch(last - first, self.shape[1]).copy_(part)

    def gather(self, ids: Tensor) -> Tensor:
        return self.values[ids].to(torch.float32)


class GGUFBlocks:
    """A weight kept in the blocks of a GGUF file: `blocks` uint8 (d_out, bytes per row) of type `kind`."""

    def __init__(self, blocks: np.ndarray, kind: GGMLQuantizationType, columns: int) -> None:
        self.blocks, self.kind = blocks, kind
        self.shape = (len(blocks), columns)
        self.size_bytes = blocks.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        out = self.rows(0, self.shape[0])
        return out if dtype == torch.float32 else out.to(dtype)

    def rows(self, first: int, last: int) -> Tensor:
        out = scratch(last - first, self.shape[1])
        ggml.dequantize_into(out.data_ptr(), self.blocks[first:last], self.kind, self.shape[1])
        return out

    def gather(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(ggml.dequantize(self.blocks[ids.numpy()], self.kind, self.shape[1]))


def from_rows(rows: np.ndarray, kind: GGMLQuantizationType, columns: int) -> Dense | GGUFBlocks:
    """The weight that stores `rows`, uint8 (d_out, bytes per row), as they are."""
    if kind not in DENSE:
        return GGUFBlocks(rows, kind, columns)
    with warnings.catch_warnings():
        # the file is mapped read-only, and nothing here ever writes to a frozen weight
        warnings.filterwarnings("ignore", message="The given (buffer|NumPy array) is not writable")
        flat = torch.from_numpy(rows.reshape(-1))
    return Dense(flat.view(DENSE[kind]).view(len(rows), columns))
