"""Frozen weights as they are stored: `Dense` floats or `GGUFBlocks`, dequantized on use into one reused buffer."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from edgelora.base import ggml
from edgelora.base.torch_blocks import DeviceBlocks
from edgelora.nn.scratch import scratch

DENSE = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


class Dense:
    """A weight kept as floats, (d_out, d_in), memory-mapped until used."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.shape = (values.shape[0], values.shape[1])
        self.size_bytes = values.numel() * values.element_size()

    def to(self, device: torch.device | str) -> Dense:
        return Dense(self.values.to(device))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.rows(0, self.shape[0], dtype)

    def rows(self, first: int, last: int, dtype: torch.dtype = torch.float32) -> Tensor:
        part = self.values[first:last]
        return part if part.dtype == dtype else scratch(last - first, self.shape[1], dtype, part.device).copy_(part)

    def gather(self, ids: Tensor) -> Tensor:
        return self.values[ids].to(torch.float32)


class GGUFBlocks:
    """A weight kept in the blocks of a GGUF file: `blocks` uint8 (d_out, bytes per row) of type `kind`."""

    def __init__(self, blocks: np.ndarray, kind: GGMLQuantizationType, columns: int) -> None:
        self.blocks, self.kind = blocks, kind
        self.shape = (len(blocks), columns)
        self.size_bytes = blocks.nbytes
        self._reader = ggml.Reader(blocks, kind, columns)

    def to(self, device: torch.device | str) -> GGUFBlocks | DeviceBlocks:
        """The same blocks in the memory of `device`. Raises BaseModelError if its type has no code for devices."""
        if torch.device(device).type == "cpu":
            return self
        return DeviceBlocks(as_tensor(self.blocks).to(device), self.kind, self.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.rows(0, self.shape[0], dtype)

    def rows(self, first: int, last: int, dtype: torch.dtype = torch.float32) -> Tensor:
        narrow = dtype == torch.bfloat16
        out = scratch(last - first, self.shape[1], dtype if narrow else torch.float32)
        self._reader.read(first, last, out.data_ptr(), bfloat16=narrow)
        return out if narrow or dtype == torch.float32 else out.to(dtype)

    def gather(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(ggml.dequantize(self.blocks[ids.numpy()], self.kind, self.shape[1]))


def from_rows(rows: np.ndarray, kind: GGMLQuantizationType, columns: int) -> Dense | GGUFBlocks:
    """The weight that stores `rows`, uint8 (d_out, bytes per row), as they are."""
    if kind not in DENSE:
        return GGUFBlocks(rows, kind, columns)
    return Dense(as_tensor(rows).view(-1).view(DENSE[kind]).view(len(rows), columns))


def as_tensor(rows: np.ndarray) -> Tensor:
    """The same memory, never to be written to."""
    with warnings.catch_warnings():
        # the file is mapped read-only, and nothing here ever writes to a frozen weight
        warnings.filterwarnings("ignore", message="The given (buffer|NumPy array) is not writable")
        return torch.from_numpy(rows)
