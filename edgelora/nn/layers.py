"""RMSNorm, rotary embedding and SwiGLU as autograd functions that save as little as they can. All are float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RMSNorm(torch.autograd.Function):
    """x / rms(x) · w with w frozen (arXiv:1910.07467). x (T, d), w (d,). Saves x and one float per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float) -> Tensor:
        y, inverse_rms = rms_norm(x, w, eps)
        ctx.save_for_backward(x, w, inverse_rms)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, w, inverse_rms = ctx.saved_tensors
        dy = grads[0] * w
        mean = (dy * x).mean(-1, keepdim=True)  # (T, 1)
        return dy.sub_(x * (mean * inverse_rms.square())).mul_(inverse_rms), None, None


def rms_norm(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed rows (T, d) and 1 / rms of each (T, 1)."""
    inverse_rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * inverse_rms).mul_(w), inverse_rms


class Rotary(torch.autograd.Function):
    """Rotate the halves of each head by its position (RoFormer, arXiv:2104.09864, HF's layout of pairs).

    x (T, H, d), cos and sin (T, 1, d / 2). The backward is the rotation by the opposite angle.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate(grads[0], cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    one, two = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=one).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=two).addcmul_(first, sin)
    return out


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each float32 (T, 1, head_dim / 2), for `positions` (T,)."""
    inverse = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = positions.to(torch.float32)[:, None] * inverse
    return angles.cos()[:, None], angles.sin()[:, None]


class SwiGLU(torch.autograd.Function):
    """silu(gate) · up (arXiv:2002.05202), both (T, ff). Saves its two inputs, not silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (dy,) = grads
        gate, up = ctx.saved_tensors
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        d_up = dy * silu
        slope = (1 - sigmoid).mul_(silu).add_(sigmoid)  # d silu / d gate
        return slope.mul_(dy).mul_(up), d_up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate).mul_(up)
