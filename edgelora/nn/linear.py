"""Linear layers over a frozen weight of any storage. No gradient of the frozen weight is ever computed or stored."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Weight(Protocol):
    """The frozen half of a linear layer, (d_out, d_in), however it is stored."""

    shape: tuple[int, int]
    size_bytes: int

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(d_out, d_in). May lie in a scratch buffer that the next call on this thread overwrites."""
        ...

    def rows(self, first: int, last: int) -> Tensor:
        """float32 (last - first, d_in), with the same life as `dequantize`'s."""
        ...

    def gather(self, ids: Tensor) -> Tensor:
        """float32 (len(ids), d_in): these rows only, in memory of their own."""
        ...


class Delta(Protocol):
    """What an adapter puts in the place of `x @ W.T` (see `peft/`)."""

    def __call__(self, x: Tensor, weight: Weight) -> Tensor: ...

    def tensors(self) -> dict[str, Tensor]:
        """What is saved of it, by PEFT's names."""
        ...


class Linear(nn.Module):
    """y = x Wᵀ + bias, or whatever its `delta` makes of x and W, + bias. x: (T, d_in) → (T, d_out)."""

    delta: Delta | None
    bias: Tensor | None

    def __init__(self, weight: Weight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.delta = None
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = FrozenLinear.apply(x, self.weight) if self.delta is None else self.delta(x, self.weight)
        return y if self.bias is None else y + self.bias


class FrozenLinear(torch.autograd.Function):
    """x Wᵀ; the backward dequantizes W again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        (dy,) = grads
        return dy @ ctx.weight.dequantize(dy.dtype) if ctx.needs_input_grad[0] else None, None


class LoraLinear(torch.autograd.Function):
    """x Wᵀ + s (x Aᵀ) Bᵀ in one node (LoRA, arXiv:2106.09685, equation 3).

    x (T, d_in), A (r, d_in), B (d_out, r), s a float. Saves x, A, B and x Aᵀ (T, r).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, a: Tensor, b: Tensor, scale: float) -> Tensor:
        down = x @ a.T  # (T, r)
        y = F.linear(x, weight.dequantize(x.dtype))
        y.addmm_(down, b.T, alpha=scale)
        ctx.save_for_backward(x, a, b, down)
        ctx.weight, ctx.scale = weight, scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        (dy,) = grads
        x, a, b, down = ctx.saved_tensors
        d_down = (dy @ b).mul_(ctx.scale)  # (T, r)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ ctx.weight.dequantize(dy.dtype)
            dx.addmm_(d_down, a)
        return dx, None, d_down.T @ x, (dy.T @ down).mul_(ctx.scale), None
