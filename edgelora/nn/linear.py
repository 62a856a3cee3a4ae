"""Linear layers over a frozen weight of any storage. No gradient of the frozen weight is ever computed or stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from edgelora.nn import cpu_lora, gpu_lora, products
from edgelora.nn.scratch import room, room_like


class Weight(Protocol):
    """The frozen half of a linear layer, (d_out, d_in), however it is stored."""

    shape: tuple[int, int]
    size_bytes: int

    def to(self, device: torch.device | str) -> Weight:
        """The same in the memory of `device`."""
        ...

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(d_out, d_in). May lie in a scratch buffer that the next call on this thread overwrites."""
        ...

    def rows(self, first: int, last: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(last - first, d_in), with the same life as `dequantize`'s."""
        ...

    def gather(self, ids: Tensor) -> Tensor:
        """float32 (len(ids), d_in): these rows only, in memory of their own."""
        ...


class Factors(NamedTuple):
    """An adapter that is a product beside the frozen one: `a` (r, d_in), `b` (d_out, r), times `scale`."""

    a: Tensor
    b: Tensor
    scale: float


class Delta(Protocol):
    """What an adapter puts in the place of `x @ W.T` (see `peft/`)."""

    @property
    def factors(self) -> Factors | None:
        """What it is made of, if it is `x @ W.T + scale (x @ a.T) @ b.T`; then it is never called."""
        ...

    def __call__(self, x: Tensor, weight: Weight) -> Tensor: ...

    def tensors(self) -> dict[str, Tensor]:
        """What is saved of it, by PEFT's names."""
        ...


@runtime_checkable
class ChangesBias(Protocol):
    """A delta that puts something in the place of the layer's bias, too."""

    def of_bias(self, bias: Tensor | None) -> Tensor | None:
        """What is added in the end, of the frozen bias (d_out,), where the layer has one."""
        ...


def bias_of(delta: Delta | None, bias: Tensor | None) -> Tensor | None:
    """The bias of a layer under this delta."""
    return delta.of_bias(bias) if isinstance(delta, ChangesBias) else bias


class Linear(nn.Module):
    """y = x Wᵀ + bias, or what its `delta` makes of x and W, + what it makes of bias. x: (T, d_in) → (T, d_out)."""

    delta: Delta | None
    bias: Tensor | None

    def __init__(self, weight: Weight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.delta = None
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor, read: bool = True) -> Tensor:
        return together(x, (self,), read)[0]

    def finish(self, y: Tensor) -> Tensor:
        """y (T, d_out) with the bias, or with what the delta makes of it."""
        bias = bias_of(self.delta, self.bias)
        return y if bias is None else y + bias.to(y.dtype)


class Unread(NamedTuple):
    """A weight whose product nobody reads: anything stands for it, and its gradients are what they would be."""

    weight: Weight


def together(x: Tensor, linears: Sequence[Linear], read: bool = True) -> tuple[Tensor, ...]:
    """What several linear layers make of the same x: in one node of the graph, where each of them has a LoRA.

    read: whether the values are, beside their gradients.
    """
    factors = [linear.delta.factors for linear in linears if linear.delta is not None]
    pairs = [pair for pair in factors if pair is not None]
    if len(pairs) == len(linears):
        flat = [tensor for pair in pairs for tensor in (pair.a, pair.b)]
        weights = [linear.weight if read else Unread(linear.weight) for linear in linears]
        ys = LoraLinears.apply(x, weights, [pair.scale for pair in pairs], *flat)
    else:
        ys = tuple(product(x, linear.weight, linear.delta) for linear in linears)
    return tuple(linear.finish(y) for linear, y in zip(linears, ys, strict=True))


def product(x: Tensor, weight: Weight, delta: Delta | None = None) -> Tensor:
    """x Wᵀ, or what the delta puts in its place: (T, d_in) → (T, d_out)."""
    if delta is None:
        return FrozenLinear.apply(x, weight)
    return delta(x, weight) if delta.factors is None else lora(x, weight, delta.factors)


def lora(x: Tensor, weight: Weight, factors: Factors) -> Tensor:
    """x Wᵀ + scale (x aᵀ) bᵀ."""
    y: Tensor = LoraLinears.apply(x, [weight], [factors.scale], factors.a, factors.b)[0]
    return y


def times_transposed(x: Tensor, weight: Weight) -> Tensor:
    """x Wᵀ: (T, d_in) → (T, d_out), outside of any graph."""
    return products.product(x, products.factor(weight, x.dtype).T)


def times(dy: Tensor, weight: Weight) -> Tensor:
    """dy W: (T, d_out) → (T, d_in), outside of any graph."""
    return products.product(dy, products.factor(weight, dy.dtype))


class FrozenLinear(torch.autograd.Function):
    """x Wᵀ; the backward dequantizes W again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight) -> Tensor:
        ctx.weight = weight
        return times_transposed(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        (dy,) = grads
        return times(dy, ctx.weight) if ctx.needs_input_grad[0] else None, None


class LoraLinears(torch.autograd.Function):
    """yᵢ = x Wᵢᵀ + sᵢ (x Aᵢᵀ) Bᵢᵀ over the same x, in one node (LoRA, arXiv:2106.09685, equation 3).

    x (T, d_in) in the dtype of the products; Wᵢ frozen (d_out, d_in), Aᵢ (r, d_in), Bᵢ (d_out, r) float32, sᵢ floats.
    All Aᵢ are one matrix here: a product as narrow as one of them is a slow one. Saves x, the pairs, and x Aᵀ (T, Σ r).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Sequence[Weight | Unread], scales: Sequence[float], *pairs: Tensor
    ) -> tuple[Tensor, ...]:
        ranks = [a.shape[0] for a in pairs[0::2]]
        if cpu_lora.usable(x, pairs):
            read = [None if isinstance(weight, Unread) else weight for weight in weights]
            ys, down = cpu_lora.forward(x, read, scales, pairs)
            return LoraLinears._kept(ctx, x, down, weights, scales, pairs, ys)
        if gpu_lora.usable(x, scales):
            a, bs = ctx.narrow = gpu_lora.narrowed(pairs, x.dtype)
        else:
            a, bs = torch.cat(pairs[0::2]).to(x.dtype), list(pairs[1::2])
        down, ys = x @ a.T, []  # (T, Σ r)
        for weight, scale, b, part in zip(weights, scales, bs, down.split(ranks, 1), strict=True):
            if isinstance(weight, Unread):
                ys.append(x.new_empty(len(x), len(b)))
                continue
            y = room(len(x), len(b), dtype=x.dtype, device=x.device)
            torch.mm(x, weight.dequantize(x.dtype).T, out=y)
            ys.append(y.addmm_(part, b.to(x.dtype).T, alpha=scale))
        return LoraLinears._kept(ctx, x, down, weights, scales, pairs, ys)

    @staticmethod
    def _kept(
        ctx: Any, x: Tensor, down: Tensor, weights: Sequence[Weight | Unread], scales: Sequence[float],
        pairs: Sequence[Tensor], ys: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.save_for_backward(x, down, *pairs)
        ctx.weights = [weight.weight if isinstance(weight, Unread) else weight for weight in weights]
        ctx.scales, ctx.ranks = scales, [len(a) for a in pairs[0::2]]
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, down, *pairs = ctx.saved_tensors
        if gpu_lora.usable(x, ctx.scales):
            dx, d_as, d_bs = gpu_lora.backward(ctx, x, down, grads)
            return dx, None, None, *(d for pair in zip(d_as, d_bs, strict=True) for d in pair)
        if cpu_lora.usable(x, pairs):
            dx, d_as, d_bs = cpu_lora.backward(ctx, x, down, pairs, grads)
            return dx, None, None, *(d for pair in zip(d_as, d_bs, strict=True) for d in pair)
        d_down, dx, d_bs = torch.empty_like(down), None, []
        narrow = zip(down.split(ctx.ranks, 1), d_down.split(ctx.ranks, 1), strict=True)  # (T, r) of each
        for weight, scale, b, (part, d_part), dy in zip(
            ctx.weights, ctx.scales, pairs[1::2], narrow, grads, strict=True
        ):
            d_bs.append((part.T @ dy).T.to(b.dtype).mul_(scale))  # in this order the faster product
            d_part.copy_(dy @ (b * scale).to(dy.dtype))  # not `out=`: see products.product
            if ctx.needs_input_grad[0]:
                w = weight.dequantize(dy.dtype)
                dx = torch.mm(dy, w, out=room_like(x, dy.dtype)) if dx is None else dx.addmm_(dy, w)
        if dx is not None:
            dx.addmm_(d_down, torch.cat(pairs[0::2]).to(dx.dtype))
        d_as = (d_down.T @ x).to(pairs[0].dtype).split(ctx.ranks)
        return dx, None, None, *(d for pair in zip(d_as, d_bs, strict=True) for d in pair)
