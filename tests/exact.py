"""A weight in float64, so that gradcheck sees small differences, and numbers to fill it with."""

from __future__ import annotations

import torch
from torch import Tensor


class Exact:
    """A `Weight` that keeps its float64 values, and counts how often it is dequantized."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.shape, self.size_bytes, self.times = values, tuple(values.shape), values.nbytes, 0

    def dequantize(self, dtype: torch.dtype = torch.float64) -> Tensor:
        self.times += 1
        return self.values.to(dtype)

    def rows(self, first: int, last: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.values[first:last].to(dtype)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    """Normal numbers, the same for the same seed."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return values.requires_grad_(grad)
