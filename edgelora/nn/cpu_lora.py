"""LoRA over frozen weights on a CPU whose sums of products are ours (nn/products.py): what `LoraLinears` computes.

Each result is summed in float32 and rounded once: an output with what the adapter adds to it, and the gradient of x
with what comes from every weight and every A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgelora.nn import products
from edgelora.nn.products import Sum
from edgelora.nn.scratch import is_scratch, room, room_like, scratch

if TYPE_CHECKING:
    from edgelora.nn.linear import Weight


def usable(x: Tensor, ranks: Sequence[int]) -> bool:
    """Whether this computes it."""
    return products.pay(x, x.dtype) and (x.dtype == torch.float32 or not any(rank % 2 for rank in ranks))


def down_of(x: Tensor, a: Tensor) -> Tensor:
    """x aᵀ, a (Σ r, d_in)."""
    down = x.new_empty(len(x), len(a))
    products.compute(Sum(down, [(x, a.T)]))
    return down


def up(x: Tensor, weight: Weight, part: Tensor, b: Tensor, scale: float) -> Tensor:
    """x Wᵀ + scale part bᵀ (T, d_out)."""
    y = room(len(x), len(b), dtype=x.dtype)
    products.compute(Sum(y, [(x, products.factor(weight, x.dtype).T), (part, _scaled(b, scale, x.dtype).T)]))
    return y


def backward(
    ctx: Any, x: Tensor, down: Tensor, pairs: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """The gradients of x, of each A and of each B."""
    d_down, d_bs, narrow = torch.empty_like(down), [], []
    parts = zip(down.split(ctx.ranks, 1), d_down.split(ctx.ranks, 1), strict=True)
    for scale, b, (part, d_part), dy in zip(ctx.scales, pairs[1::2], parts, grads, strict=True):
        d_b = torch.empty(b.shape[1], b.shape[0])
        d_bs.append(d_b)
        narrow += [Sum(d_part, [(dy, _scaled(b, scale, dy.dtype))]), Sum(d_b, [(part.T, dy)])]
    products.compute(*narrow)
    for scale, d_b in zip(ctx.scales, d_bs, strict=True):
        if scale != 1:
            d_b.mul_(scale)
    d_a = torch.empty(d_down.shape[1], x.shape[1])
    last, dx = [Sum(d_a, [(d_down.T, x)])], None
    if ctx.needs_input_grad[0]:
        dx = room_like(x)
        last.append(_d_input(ctx.weights, grads, dx, (d_down, torch.cat(list(pairs[0::2])).to(x.dtype))))
    products.compute(*last)
    return dx, list(d_a.split(ctx.ranks)), [d_b.T for d_b in d_bs]


def _d_input(weights: Sequence[Weight], grads: Sequence[Tensor], dx: Tensor, last: tuple[Tensor, Tensor]) -> Sum:
    """Σ dy W + last, into dx. What cannot wait, because its weight lies where the next one will, is computed here."""
    terms, so_far = [], None
    for i, (weight, dy) in enumerate(zip(weights, grads, strict=True)):
        w = products.factor(weight, dy.dtype)
        terms.append((dy, w))
        if i + 1 < len(weights) and is_scratch(w):
            sums = scratch(len(dx), dx.shape[1], use="sums")
            products.compute(Sum(sums, terms, so_far))
            terms, so_far = [], sums
    return Sum(dx, [*terms, last], so_far)


def _scaled(b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return (b if scale == 1 else b * scale).to(dtype)
