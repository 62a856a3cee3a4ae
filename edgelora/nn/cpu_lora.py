"""LoRA over frozen weights on a CPU whose sums of products are ours (nn/products.py): what `LoraLinears` computes.

Each result is summed in float32 and rounded once: an output with what the adapter adds to it, and the gradient of x
with what comes from every weight and every A. The scale goes to A in the forward pass and to B in the backward one, so
that each gradient has it once.
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


def forward(
    x: Tensor, weights: Sequence[Weight | None], scales: Sequence[float], pairs: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """The outputs (zeros where there is no weight, because nobody reads them), and sᵢ x Aᵢᵀ (T, Σ r)."""
    a = _stacked(pairs[0::2], scales, x.dtype)
    down = room(x.shape[0], a.shape[0], dtype=x.dtype)
    products.compute(Sum(down, [(x, a.T)]))
    ys, parts = [], down.split([a.shape[0] for a in pairs[0::2]], 1)
    for weight, b, part in zip(weights, pairs[1::2], parts, strict=True):
        if weight is None:
            ys.append(x.new_zeros(x.shape[0], b.shape[0]))
            continue
        ys.append(y := room(x.shape[0], b.shape[0], dtype=x.dtype))
        products.compute(Sum(y, [(x, products.factor(weight, x.dtype).T), (part, b.to(x.dtype).T)]))
    return ys, down


def backward(
    ctx: Any, x: Tensor, down: Tensor, pairs: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """The gradients of x, of each A and of each B. `down` is what `forward` gave."""
    d_down, d_bs, narrow = room_like(down), [torch.empty_like(b) for b in pairs[1::2]], []
    parts = zip(down.split(ctx.ranks, 1), d_down.split(ctx.ranks, 1), strict=True)
    for scale, b, d_b, (part, d_part), dy in zip(ctx.scales, pairs[1::2], d_bs, parts, grads, strict=True):
        narrow += [Sum(d_part, [(dy, _stacked([b], [scale], dy.dtype))]), Sum(d_b, [(dy.T, part)])]
    products.compute(*narrow)
    d_a = torch.empty(d_down.shape[1], x.shape[1])
    last, dx = [Sum(d_a, [(d_down.T, x)])], None
    if ctx.needs_input_grad[0]:
        dx = room_like(x)
        a = _stacked(pairs[0::2], [1.0], x.dtype)
        last.append(_d_input(ctx.weights, grads, dx, (d_down, a)))
    products.compute(*last)
    return dx, list(d_a.split(ctx.ranks)), d_bs


def _d_input(weights: Sequence[Weight], grads: Sequence[Tensor], dx: Tensor, last: tuple[Tensor, Tensor]) -> Sum:
    """Σ dy W + last, into dx. What cannot wait, because its weight lies where the next one will, is computed here."""
    terms, so_far = [], None
    for i, (weight, dy) in enumerate(zip(weights, grads, strict=True)):
        w = products.factor(weight, dy.dtype)
        terms.append((dy, w))
        if i + 1 < len(weights) and is_scratch(w):
            sums = scratch(dx.shape[0], dx.shape[1], use="sums")
            products.compute(Sum(sums, terms, so_far))
            terms, so_far = [], sums
    return Sum(dx, [*terms, last], so_far)


def _stacked(matrices: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype) -> Tensor:
    """The matrices (r, d) above each other, each times its scale, in `dtype`."""
    if len(set(scales)) > 1:
        matrices, scales = [m * scale for m, scale in zip(matrices, scales, strict=True)], [1.0]
    whole = matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))
    return (whole if scales[0] == 1 else whole * scales[0]).to(dtype)
