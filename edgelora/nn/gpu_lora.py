"""LoRA over frozen weights on an NVIDIA GPU: what `LoraLinears` computes, in half as many launches.

Each launch costs Python some microseconds, and a step of an 8B model has thousands. So all pairs of one x are narrowed
at once, gradients come out of their products in float32, and the scale goes to what is as narrow as the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from edgelora.nn import gpu


def usable(x: Tensor, scales: Sequence[float]) -> bool:
    """Whether this computes it: in bfloat16, on a card with Triton, with one scale for all pairs."""
    return x.dtype == torch.bfloat16 and len(set(scales)) == 1 and gpu.has_triton(x.device)


def narrowed(pairs: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """All Aᵢ as one matrix (Σ r, d_in), and the Bᵢ (d_out, r), in `dtype`."""
    ranks = [len(a) for a in pairs[0::2]]
    a = torch.empty(sum(ranks), pairs[0].shape[1], dtype=dtype, device=pairs[0].device)
    bs = [torch.empty_like(b, dtype=dtype) for b in pairs[1::2]]
    torch._foreach_copy_([*a.split(ranks), *bs], [*pairs[0::2], *pairs[1::2]])
    return a, bs


def backward(
    ctx: Any, x: Tensor, down: Tensor, grads: Sequence[Tensor]
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """The gradients of x, of each A and of each B. `ctx.narrow` is what `narrowed` gave."""
    scale, ranks, (a, bs) = ctx.scales[0], ctx.ranks, ctx.narrow
    d_down, scaled, dx = torch.empty_like(down), (down * scale).split(ranks, 1), None
    d_bs = []
    for weight, b, part, d_part, dy in zip(ctx.weights, bs, scaled, d_down.split(ranks, 1), grads, strict=True):
        d_bs.append(torch.mm(dy.T, part, out_dtype=torch.float32))
        torch.mm(dy, b, out=d_part)
        if ctx.needs_input_grad[0]:
            w = weight.dequantize(dy.dtype)
            dx = dy @ w if dx is None else dx.addmm_(dy, w)
    d_down.mul_(scale)
    if dx is not None:
        dx.addmm_(d_down, a)
    return dx, list(torch.mm(d_down.T, x, out_dtype=torch.float32).split(ranks)), d_bs
