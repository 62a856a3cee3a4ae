"""Products with a stored weight, in whichever way its device is fastest at; and whether Triton's kernels run there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from edgelora.nn.gpu import has_triton as has_triton

if TYPE_CHECKING:
    from edgelora.base.triton_blocks import Stored


class Products(ABC):
    """A weight W (d_out, d_in) that multiplies without a dense copy of itself where that is faster."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(d_out, d_in)."""

    @abstractmethod
    def for_triton(self) -> Stored | None:
        """The weight as kernels take it; None where they do not run, or there is none for its type."""

    def times_transposed(self, x: Tensor) -> Tensor:
        """x (T, d_in) → x Wᵀ (T, d_out), in x's dtype."""
        if (stored := self.for_triton()) is not None:
            from edgelora.base import triton_matmul

            return triton_matmul.times_transposed(x, stored)
        return F.linear(x, self.dequantize(x.dtype))

    def times(self, dy: Tensor) -> Tensor:
        """dy (T, d_out) → dy W (T, d_in), in dy's dtype."""
        if (stored := self.for_triton()) is not None:
            from edgelora.base import triton_matmul

            return triton_matmul.times(dy, stored)
        return dy @ self.dequantize(dy.dtype)
