"""Columns of activations times a trained factor each: DoRA's lengths, IA3's scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgelora.nn.scratch import room_like


class Scaled(torch.autograd.Function):
    """x (T, d) ∘ factor (d,), float32, rounded once to the dtype of x. Saves x and the factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(x, factor)
        return torch.mul(x, factor, out=room_like(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (dy,), (x, factor) = grads, ctx.saved_tensors
        dx = d_factor = None
        if ctx.needs_input_grad[0]:
            dx = torch.mul(dy, factor, out=room_like(x))
        if ctx.needs_input_grad[1]:
            d_factor = torch.mul(dy.to(factor.dtype), x, out=room_like(x, factor.dtype)).sum(0)
        return dx, d_factor


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x (T, d) ∘ factor (d,)."""
    y: Tensor = Scaled.apply(x, factor)
    return y
