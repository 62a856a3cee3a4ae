"""RMSNorm as an autograd function that saves as little as it can. Computed in float32, whatever it reads and gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RMSNorm(torch.autograd.Function):
    """x / rms(x) · w with w frozen (arXiv:1910.07467). x (…, d), w (d,). Saves x and one float per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
        y, inverse_rms = rms_norm(x, w, eps)
        ctx.save_for_backward(x, w, inverse_rms)
        return y if dtype is None else y.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        x, w, inverse_rms = ctx.saved_tensors
        dy = grads[0] * w  # (…, d) float32
        mean = (dy * x).mean(-1, keepdim=True)  # (…, 1)
        dx = dy.addcmul_(x, mean * inverse_rms.square(), value=-1).mul_(inverse_rms)
        return dx.to(x.dtype), None, None, None


def rms_norm(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed rows (…, d) and 1 / rms of each (…, 1), in float32 or, for float64, in that."""
    x = x.to(w.dtype)
    inverse_rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * inverse_rms).mul_(w), inverse_rms
