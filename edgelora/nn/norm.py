"""RMSNorm as an autograd function that saves as little as it can. float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RMSNorm(torch.autograd.Function):
    """x / rms(x) · w with w frozen (arXiv:1910.07467). x (…, d), w (d,). Saves x and one float per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float) -> Tensor:
        y, inverse_rms = rms_norm(x, w, eps)
        ctx.save_for_backward(x, w, inverse_rms)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, w, inverse_rms = ctx.saved_tensors
        dy = grads[0] * w
        mean = (dy * x).mean(-1, keepdim=True)  # (…, 1)
        return dy.sub_(x * (mean * inverse_rms.square())).mul_(inverse_rms), None, None


def rms_norm(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed rows (…, d) and 1 / rms of each (…, 1)."""
    inverse_rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * inverse_rms).mul_(w), inverse_rms
