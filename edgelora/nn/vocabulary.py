"""The embedding or the head, of which an adapter can put other rows in the place of some tokens', or move all."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from edgelora.nn.linear import Weight
from edgelora.nn.scratch import scratch


class NewRows(Protocol):
    """What an adapter puts in the place of the rows of some tokens: `ids` (k,), `rows` float32 (k, d)."""

    @property
    def ids(self) -> Tensor: ...

    @property
    def rows(self) -> Tensor: ...

    def tensors(self) -> dict[str, Tensor]:
        """What is saved of it, by PEFT's names."""
        ...


@runtime_checkable
class Moves(Protocol):
    """What an adapter adds to the rows of all tokens: `delta` float32 (V, d)."""

    @property
    def delta(self) -> Tensor: ...

    def tensors(self) -> dict[str, Tensor]:
        """What is saved of it, by PEFT's names."""
        ...


class Vocabulary(nn.Module):
    """A row for each token, (V, d), or what its `delta` makes of it."""

    delta: NewRows | Moves | None

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.weight, self.delta = weight, None

    def forward(self, ids: Tensor) -> Tensor:
        """ids (T,) → float32 (T, d)."""
        x = self.weight.gather(ids)
        if self.delta is None:
            return x
        if isinstance(self.delta, Moves):
            moved: Tensor = LookedUp.apply(self.delta.delta, ids)
            return x + moved
        at, which = (ids[:, None] == self.delta.ids).nonzero(as_tuple=True)  # (T, k), of a few tokens
        return x.index_put((at,), self.delta.rows[which])


class LookedUp(torch.autograd.Function):
    """The rows `ids` (T,) of a parameter (V, d). Its gradient goes where it is summed up (`gradient_of`)."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, ids: Tensor) -> Tensor:
        ctx.parameter, ctx.ids = parameter, ids
        return parameter[ids]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        gradient_of(ctx.parameter).index_add_(0, ctx.ids, grads[0])
        return None, None


def gradient_of(parameter: Tensor) -> Tensor:
    """Where the gradient of a parameter (V, d) is summed up: one matrix of this size in a step, where autograd would
    have one for each use of it and one more for each micro-batch."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


class Moved:
    """A frozen weight (V, d) and what is added to it, as one weight; made a few rows at a time."""

    def __init__(self, weight: Weight, delta: Tensor) -> None:
        self.weight, self.delta = weight, delta.detach()
        self.shape, self.size_bytes = weight.shape, weight.size_bytes + delta.nbytes

    def to(self, device: torch.device | str) -> Moved:
        return Moved(self.weight.to(device), self.delta.to(device))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.rows(0, self.shape[0], dtype)

    def rows(self, first: int, last: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Summed in the type of what is added, whose small steps bfloat16 would lose; who asks for that has it rounded
        once."""
        kind = self.delta.dtype
        out = scratch(last - first, self.shape[1], kind, self.delta.device, use="moved")
        torch.add(self.weight.rows(first, last, kind), self.delta[first:last], out=out)
        return out if dtype == kind else out.to(dtype)

    def gather(self, ids: Tensor) -> Tensor:
        return self.weight.gather(ids) + self.delta[ids]
