"""Layers whose whole weight is another: y = x W′ᵀ, W′ = f(W, θ). W′ is made where it is read, and never kept.

The gradient of W′, dyᵀ x (d_out, d_in), is there for a moment too, until the method's own are made of it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from edgelora.errors import ConfigError
from edgelora.nn import products
from edgelora.nn.linear import Weight
from edgelora.nn.scratch import scratch


class Rule(Protocol):
    """f of a method, and its gradients. All tensors are of the dtype of θ."""

    def weight(self, w: Tensor, out: Tensor, *parameters: Tensor) -> None:
        """Write W′ (d_out, d_in) into `out`, which may be the memory of `w`."""
        ...

    def gradients(self, w: Tensor, g: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Of θ, by that of W′. `g` (d_out, d_in) may be overwritten, or given back."""
        ...


def product(x: Tensor, weight: Weight, rule: Rule, *parameters: Tensor) -> Tensor:
    """x W′ᵀ (T, d_out) in the dtype of x (T, d_in)."""
    y: Tensor = Remade.apply(x, weight, rule, *parameters)  # type: ignore[no-untyped-call]
    return y


class Remade(torch.autograd.Function):
    """x W′ᵀ; the backward makes W′ again instead of keeping it. Saves x and θ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, rule: Rule, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x, *parameters)
        ctx.weight, ctx.rule = weight, rule
        return products.product(x, _remade(weight, rule, parameters, x.dtype).T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, *parameters = ctx.saved_tensors
        dtype = parameters[0].dtype
        dx = None
        if ctx.needs_input_grad[0]:
            dx = products.product(dy, _remade(ctx.weight, ctx.rule, parameters, dy.dtype))
        of_weight = products.product(dy.T, x).to(dtype)
        return dx, None, None, *ctx.rule.gradients(ctx.weight.dequantize(dtype), of_weight, *parameters)


def _remade(weight: Weight, rule: Rule, parameters: tuple[Tensor, ...] | list[Tensor], dtype: torch.dtype) -> Tensor:
    """W′ in `dtype`, in a scratch buffer. It is made in the dtype of θ, whose small steps bfloat16 would lose."""
    first = parameters[0]
    w = weight.dequantize(first.dtype)
    out = scratch(*weight.shape, first.dtype, first.device)
    rule.weight(w, out, *parameters)
    return out if dtype == first.dtype else scratch(*weight.shape, dtype, first.device).copy_(out)


def require_floats(weight: Weight, method: str) -> None:
    """Raise ConfigError for a weight that is not stored as floats: blocks and NF4 take less than 16 bits for each."""
    if weight.size_bytes < 2 * weight.shape[0] * weight.shape[1]:
        raise no_floats(method, "the base's weights are quantized")


def no_floats(method: str, what: str) -> ConfigError:
    """The error of a method that changes W itself, over a base that has no room for that."""
    return ConfigError(
        what=f"--method {method}: {what}",
        why="it changes every weight by a little of its own, which blocks of a few bits cannot take up",
        fix="pass --base-dtype f32, or bf16 for half the memory; --method lora trains over blocks as they are",
    )
