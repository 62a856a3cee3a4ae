"""RMSNorm: a layer whose weight an adapter can put another in the place of, over a function that saves little.

Computed in float32, whatever it reads and gives. The layer that reads what it gives keeps that, and it says all that
the backward pass asks of x: so x itself is let go, which is float32 as the residual stream is.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from edgelora.nn import compiled, gpu
from edgelora.nn.scratch import room_like


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
        self.hides = bool((weight == 0).any())

    def forward(self, x: Tensor) -> Tensor:
        return RMSNorm.apply(x, self._weight, self.eps, self.dtype, not self.keeps_input)

    def plain(self, x: Tensor) -> Tensor:
        """The same values without a place in the graph."""
        return rms_norm(x, self._weight.detach(), self.eps, self.dtype)[0]

    @property
    def keeps_input(self) -> bool:
        """Whether its backward pass asks for x itself: where the weight is trained, or hides a number of x by a 0."""
        return self.hides or self.delta is not None

    @property
    def _weight(self) -> Tensor:
        return self.weight if self.delta is None else self.delta.weight


class RMSNorm(torch.autograd.Function):
    """x / rms(x) · w (arXiv:1910.07467). x (…, d), w (d,), frozen or trained. Saves one float per row, and x or y.

    by_output: w has no zero, so that y / w is x / rms(x); then y is saved, of anything but a bfloat16 x.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, eps: float, dtype: torch.dtype | None = None, by_output: bool = False
    ) -> Tensor:
        x = x.contiguous()
        y, inverse_rms = rms_norm(x, w, eps, dtype)
        # of a bfloat16 x the output is no smaller, and rounded once more
        ctx.is_output, ctx.dtype = by_output and x.dtype != torch.bfloat16, x.dtype
        ctx.save_for_backward(y if ctx.is_output else x, w, inverse_rms)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        kept, w, inverse_rms = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _backward(grads[0], kept, w, inverse_rms, ctx.dtype, ctx.is_output)
        if ctx.needs_input_grad[1]:
            normed = kept.to(inverse_rms.dtype)
            normed = normed / w if ctx.is_output else normed * inverse_rms  # (…, d)
            dw = (normed * grads[0]).flatten(0, -2).sum(0)
        return dx, dw, None, None, None


def rms_norm(x: Tensor, w: Tensor, eps: float, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The normed rows (…, d) in `dtype` (None: that of w), and 1 / rms of each (…, 1)."""
    dtype = dtype or w.dtype
    if compiled.usable(x) and w.dtype == torch.float32 and dtype in compiled.NARROW:
        x = x.contiguous()
        y, inverse_rms = room_like(x, dtype), torch.empty(*x.shape[:-1], 1)
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


def _backward(dy: Tensor, kept: Tensor, w: Tensor, inverse_rms: Tensor, dtype: torch.dtype, is_output: bool) -> Tensor:
    """The gradient of x in `dtype`, which is its own, from x or from the output."""
    if compiled.usable(dy) and compiled.usable(kept) and w.dtype == torch.float32 and dtype in compiled.NARROW:
        assert not is_output or dy.dtype == kept.dtype  # C reads both as one type
        dy, dx = dy.contiguous(), room_like(kept, dtype)
        compiled.over_rows(
            "rms_norm_backward", inverse_rms.numel(), kept.shape[-1], dy, kept, w, inverse_rms, dx,
            kept.shape[-1], compiled.NARROW[dtype], compiled.NARROW[dy.dtype], is_output,
        )  # fmt: skip
        return dx
    if gpu.usable(dy, kept) and w.dtype == torch.float32:
        d_rows: Tensor = gpu.kernels().rms_norm_backward(dy, kept, w, inverse_rms, dtype, is_output)
        return d_rows
    normed = kept / w if is_output else kept * inverse_rms
    dy = dy * w  # (…, d) float32
    mean = (dy * normed).mean(-1, keepdim=True)  # (…, 1)
    return dy.addcmul_(normed, mean, value=-1).mul_(inverse_rms).to(dtype)
