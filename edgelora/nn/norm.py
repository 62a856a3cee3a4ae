"""RMSNorm: a layer whose weight an adapter can put another in the place of, over a function that saves little.

Computed in float32, whatever it reads and gives.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from edgelora.nn import compiled, gpu


class NewWeight(Protocol):
    """What an adapter puts in the place of a norm's weight (d,)."""

    @property
    def weight(self) -> Tensor: ...

    def tensors(self) -> dict[str, Tensor]:
        """What is saved of it, by PEFT's names."""
        ...


class Norm(nn.Module):
    """x / rms(x) · w, where w is `weight`, or its `delta`'s. shift: what HF's weight lacks of w."""

    delta: NewWeight | None
    weight: Tensor

    def __init__(self, weight: Tensor, eps: float, dtype: torch.dtype = torch.float32, shift: float = 0.0) -> None:
        super().__init__()
        self.eps, self.dtype, self.shift = eps, dtype, shift
        self.delta = None
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return RMSNorm.apply(x, self._weight, self.eps, self.dtype)

    def plain(self, x: Tensor) -> Tensor:
        """The same values without a place in the graph."""
        return rms_norm(x, self._weight.detach(), self.eps, self.dtype)[0]

    @property
    def _weight(self) -> Tensor:
        return self.weight if self.delta is None else self.delta.weight


class RMSNorm(torch.autograd.Function):
    """x / rms(x) · w (arXiv:1910.07467). x (…, d), w (d,), frozen or trained. Saves x and one float per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
        x = x.contiguous()
        y, inverse_rms = rms_norm(x, w, eps, dtype)
        ctx.save_for_backward(x, w, inverse_rms)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, w, inverse_rms = ctx.saved_tensors
        dw = _backward_of_weight(grads[0], x, inverse_rms) if ctx.needs_input_grad[1] else None
        return _backward(grads[0], x, w, inverse_rms) if ctx.needs_input_grad[0] else None, dw, None, None


def rms_norm(x: Tensor, w: Tensor, eps: float, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The normed rows (…, d) in `dtype` (None: that of w), and 1 / rms of each (…, 1)."""
    dtype = dtype or w.dtype
    if compiled.usable(x) and w.dtype == torch.float32 and dtype in compiled.NARROW:
        x = x.contiguous()
        y, inverse_rms = torch.empty_like(x, dtype=dtype), torch.empty(*x.shape[:-1], 1)
        compiled.over_rows(
            "rms_norm_forward", inverse_rms.numel(), x.shape[-1], x, w, y, inverse_rms,
            x.shape[-1], compiled.NARROW[x.dtype], compiled.NARROW[dtype], eps,
        )  # fmt: skip
        return y, inverse_rms
    if gpu.usable(x) and w.dtype == torch.float32:
        normed: tuple[Tensor, Tensor] = gpu.kernels().rms_norm(x, w, eps, dtype)
        return normed
    x = x.to(w.dtype)
    inverse_rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * inverse_rms).mul_(w).to(dtype), inverse_rms


def _backward(dy: Tensor, x: Tensor, w: Tensor, inverse_rms: Tensor) -> Tensor:
    if compiled.usable(dy) and compiled.usable(x) and w.dtype == torch.float32:
        dy, dx = dy.contiguous(), torch.empty_like(x)
        compiled.over_rows(
            "rms_norm_backward", inverse_rms.numel(), x.shape[-1], dy, x, w, inverse_rms, dx,
            x.shape[-1], compiled.NARROW[x.dtype], compiled.NARROW[dy.dtype],
        )  # fmt: skip
        return dx
    if gpu.usable(dy, x) and w.dtype == torch.float32:
        d_rows: Tensor = gpu.kernels().rms_norm_backward(dy, x, w, inverse_rms)
        return d_rows
    dy = dy * w  # (…, d) float32
    mean = (dy * x).mean(-1, keepdim=True)  # (…, 1)
    return dy.addcmul_(x, mean * inverse_rms.square(), value=-1).mul_(inverse_rms).to(x.dtype)


def _backward_of_weight(dy: Tensor, x: Tensor, inverse_rms: Tensor) -> Tensor:
    """Σ dy ∘ x / rms(x) over all rows, in the type of 1 / rms(x)."""
    normed = x.to(inverse_rms.dtype) * inverse_rms  # (…, d)
    return normed.mul_(dy).flatten(0, -2).sum(0)
