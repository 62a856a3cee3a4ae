"""PEFT's lora_dropout: while something is learned, A sees x with a part of its numbers at zero, each layer another.

y = x Wᵀ + s (drop(x) Aᵀ) Bᵀ. Masks are drawn for each micro-batch and layer from one number, so that a layer that is
computed again sees the same, and a run that goes on draws what it would have drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from edgelora.nn.dropped import Drop, dropped_lora
from edgelora.nn.linear import Delta, Factors, Weight, product

SEEDS = 1 << 48  # of which a micro-batch gets one, and its layers those behind it

D = TypeVar("D")


@runtime_checkable
class OwnDropout(Protocol):
    """A delta in which more hangs on what A sees than a product beside the frozen one."""

    def dropped(self, x: Tensor, weight: Weight, drop: Drop) -> Tensor:
        """x (T, d_in) → (T, d_out), with A seeing drop(x)."""
        ...


class DroppedDelta(nn.Module):
    """What `inner` computes; while `drop` is set, with A seeing what that leaves of x. `inner` has factors, or a way of
    its own."""

    def __init__(self, inner: Delta, p: float) -> None:
        super().__init__()
        self.inner, self.p = inner, p
        self.drop: Drop | None = None

    @property
    def factors(self) -> Factors | None:
        return self.inner.factors if self.drop is None else None

    def forward(self, x: Tensor, weight: Weight) -> Tensor:
        if self.drop is None:
            return product(x, weight, self.inner)
        if isinstance(self.inner, OwnDropout):
            return self.inner.dropped(x, weight, self.drop)
        factors = self.inner.factors
        assert factors is not None
        return dropped_lora(x, weight, factors, self.drop)

    def tensors(self) -> dict[str, Tensor]:
        return self.inner.tensors()


def bare(delta: Delta | None) -> Delta | None:
    """A method's own delta, which may stand under a dropout."""
    return delta.inner if isinstance(delta, DroppedDelta) else delta


def all_of(deltas: Iterable[Delta], kind: type[D]) -> list[D]:
    """Those that are a method's own among these, as `bare` gives them."""
    return [delta for delta in map(bare, deltas) if isinstance(delta, kind)]


def draw(deltas: Sequence[Delta], generator: torch.Generator | None) -> None:
    """Before a micro-batch: what each layer leaves out. None: nothing, what follows is measured."""
    dropped = [delta for delta in deltas if isinstance(delta, DroppedDelta)]
    if not dropped:
        return
    first = None if generator is None else int(torch.randint(SEEDS, (), generator=generator))
    for i, delta in enumerate(dropped):
        delta.drop = None if first is None else Drop(delta.p, first + i)
