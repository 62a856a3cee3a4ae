"""LoRAs that see only a part of x: dropout before A, whose mask is made from a seed and never kept."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from edgelora.nn.linear import Factors, Weight, times_transposed
from edgelora.nn.products import add_product, factor, product


class Drop(NamedTuple):
    """Each number is zero with probability `p`, the others grow by 1/(1 − p); decided by `seed`, on one device."""

    p: float
    seed: int

    def __call__(self, x: Tensor) -> Tensor:
        """A new tensor like x."""
        generator = torch.Generator(x.device).manual_seed(self.seed)
        # numbers are drawn in the order in which they lie: in another one a gradient would get another mask
        kept = torch.empty_like(x, memory_format=torch.contiguous_format).bernoulli_(1 - self.p, generator=generator)
        return kept.mul_(x).div_(1 - self.p)


class DroppedLora(torch.autograd.Function):
    """y = x Wᵀ + s m ∘ (drop(x) Aᵀ) Bᵀ: x (T, d_in), W frozen (d_out, d_in), A (r, d_in) and B (d_out, r) float32.

    m (T, 1) says on which tokens it acts, None: on all. Saves x and m ∘ drop(x) Aᵀ (T, r), as a LoRA without dropout
    does; the mask is drawn again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Weight, drop: Drop, rows: Tensor | None, scale: float, a: Tensor, b: Tensor
    ) -> Tensor:
        down = drop(x) @ a.to(x.dtype).T
        if rows is not None:
            down *= rows
        y = times_transposed(x, weight)
        ctx.save_for_backward(x, down, a, b)
        ctx.weight, ctx.drop, ctx.rows, ctx.scale = weight, drop, rows, scale
        return y.addmm_(down, b.to(x.dtype).T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, down, a, b) = grads, ctx.saved_tensors
        d_b = (down.T @ dy).T.to(b.dtype).mul_(ctx.scale)
        d_down = dy @ (b * ctx.scale).to(dy.dtype)
        if ctx.rows is not None:
            d_down *= ctx.rows
        d_a = (d_down.T @ ctx.drop(x)).to(a.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = add_product(ctx.drop(d_down @ a.to(dy.dtype)), dy, factor(ctx.weight, dy.dtype))
        return dx, None, None, None, None, d_a, d_b


def dropped_lora(x: Tensor, weight: Weight, factors: Factors, drop: Drop, rows: Tensor | None = None) -> Tensor:
    """x Wᵀ + scale m ∘ (drop(x) aᵀ) bᵀ, m (T, 1) being `rows`, or 1."""
    y: Tensor = DroppedLora.apply(x, weight, drop, rows, factors.scale, factors.a, factors.b)
    return y


class Parted(torch.autograd.Function):
    """y = drop(x) (W + s B A)ᵀ and z = (x − drop(x)) Wᵀ, both (T, d_out), in one node that reads W once.

    Shapes as above. Saves x and drop(x) Aᵀ (T, r).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Weight, drop: Drop, scale: float, a: Tensor, b: Tensor
    ) -> tuple[Tensor, Tensor]:
        seen = drop(x)
        down = seen @ a.to(x.dtype).T
        ctx.save_for_backward(x, down, a, b)
        ctx.weight, ctx.drop, ctx.scale = weight, drop, scale
        w = factor(weight, x.dtype).T
        y = product(seen, w).addmm_(down, b.to(x.dtype).T, alpha=scale)
        return y, product(x - seen, w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy, dz), (x, down, a, b) = grads, ctx.saved_tensors
        d_b = (down.T @ dy).T.to(b.dtype).mul_(ctx.scale)
        d_down = dy @ (b * ctx.scale).to(dy.dtype)
        d_a = (d_down.T @ ctx.drop(x)).to(a.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            w = factor(ctx.weight, dy.dtype)
            dx = add_product(ctx.drop(add_product(d_down @ a.to(dy.dtype), dy - dz, w)), dz, w)
        return dx, None, None, None, d_a, d_b


def parted(x: Tensor, weight: Weight, factors: Factors, drop: Drop) -> tuple[Tensor, Tensor]:
    """drop(x) (W + scale b a)ᵀ, and what W makes of what is left out."""
    y, z = Parted.apply(x, weight, drop, factors.scale, factors.a, factors.b)
    return y, z
