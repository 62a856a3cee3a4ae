"""LoRA over frozen weights on a CPU whose sums of products are ours (nn/products.py): what `LoraLinears` computes.

Each result is summed in float32 and rounded once: an output with what the adapter adds to it, and the gradient of x
with what comes from every weight and every A. The scale goes to A in the forward pass and to B in the backward one, so
that each gradient has it once.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgelora import team
from edgelora.kernels import call
from edgelora.nn import products
from edgelora.nn.compiled import NARROW, WORTH_A_THREAD
from edgelora.nn.products import Sum
from edgelora.nn.scratch import is_scratch, room, room_like, scratch

if TYPE_CHECKING:
    from edgelora.nn.linear import Weight

COPY = "PPqd"  # kernels/layers.c: from, to, how many numbers, times what


def usable(x: Tensor, pairs: Sequence[Tensor]) -> bool:
    """Whether this computes it: bfloat16 numbers pass by twos, and nothing of a width that is odd."""
    if not products.pay(x, x.dtype) or any(one.dtype != torch.float32 for one in pairs):
        return False
    return x.dtype == torch.float32 or not any(b.shape[0] % 2 or b.shape[1] % 2 for b in pairs[1::2])


def forward(
    x: Tensor, weights: Sequence[Weight | None], scales: Sequence[float], pairs: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """The outputs (zeros where there is no weight, because nobody reads them), and sᵢ x Aᵢᵀ (T, Σ r)."""
    a, bs = _factors(pairs, scales, [1.0] * len(scales), x.dtype)
    down = room(x.shape[0], a.shape[0], dtype=x.dtype)
    products.compute(Sum(down, [(x, a.T)]))
    ys, parts = [], down.split([a.shape[0] for a in pairs[0::2]], 1)
    for weight, b, part in zip(weights, bs, parts, strict=True):
        if weight is None:
            ys.append(x.new_zeros(x.shape[0], b.shape[0]))
            continue
        ys.append(y := room(x.shape[0], b.shape[0], dtype=x.dtype))
        products.compute(Sum(y, [(x, products.factor(weight, x.dtype).T), (part, b.T)]))
    return ys, down


def backward(
    ctx: Any, x: Tensor, down: Tensor, pairs: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """The gradients of x, of each A and of each B. `down` is what `forward` gave."""
    d_down, d_bs, narrow = room_like(down), [torch.empty(b.shape) for b in pairs[1::2]], []
    parts = zip(down.split(ctx.ranks, 1), d_down.split(ctx.ranks, 1), strict=True)
    a, bs = _factors(pairs, [1.0] * len(ctx.scales), ctx.scales, x.dtype)
    for b, d_b, (part, d_part), dy in zip(bs, d_bs, parts, grads, strict=True):
        narrow += [Sum(d_part, [(dy, b)]), Sum(d_b, [(dy.T, part)])]
    products.compute(*narrow)
    d_a = torch.empty(d_down.shape[1], x.shape[1])
    last, dx = [Sum(d_a, [(d_down.T, x)])], None
    if ctx.needs_input_grad[0]:
        dx = room_like(x)
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


def _factors(
    pairs: Sequence[Tensor], a_scales: Sequence[float], b_scales: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """All A (Σ r, d_in) above each other, and each B (d_out, r), times their scales, in `dtype`.

    In one call, into a buffer that the next one overwrites: as operators of torch they took 2 % of a step.
    """
    a_s, bs = pairs[0::2], pairs[1::2]
    ordered = [one.contiguous() for one in (*a_s, *bs)]
    sizes = [one.numel() for one in ordered]
    memory = scratch(1, sum(sizes), dtype, use="adapter").view(-1)
    at, listed = memory.data_ptr(), ctypes.create_string_buffer(struct.calcsize(COPY) * len(sizes))
    for i, (one, size, scale) in enumerate(zip(ordered, sizes, (*a_scales, *b_scales), strict=True)):
        struct.pack_into(COPY, listed, i * struct.calcsize(COPY), one.data_ptr(), at, size, scale)
        at += size * dtype.itemsize
    job = call.packed("scaled_copies", ctypes.addressof(listed), NARROW[dtype])
    call.run("scaled_copies", job, len(sizes), len(team.split(len(sizes), sum(sizes), WORTH_A_THREAD)))
    first, *rest = memory.split([sum(sizes[: len(a_s)]), *sizes[len(a_s) :]])
    return first.view(-1, a_s[0].shape[1]), [part.view(b.shape) for part, b in zip(rest, bs, strict=True)]
