"""DyLoRA (arXiv:2210.07558): each micro-batch learns with the first b ranks alone, so that any first b are an adapter.

y = x Wᵀ + α/b (x A₁..bᵀ) B₁..bᵀ with b drawn from 1 … r (algorithm 1); at other times b is r. Of the trained
adapter any first b leave as a LoRA of that rank: `first_ranks.py`, `edgelora export --rank`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgelora.nn.linear import Delta, Factors, Weight
from edgelora.peft.around import Around
from edgelora.peft.dropout import all_of
from edgelora.peft.lora import LoraDelta, fresh_pair


class DyloraDelta(LoraDelta):
    """A LoRA of which the first `active` ranks count; all of them where that is None."""

    def __init__(self, a: Tensor, b: Tensor, alpha: float) -> None:
        super().__init__(a, b, alpha / len(a))
        self.alpha = alpha
        self.active: int | None = None

    @property
    def factors(self) -> Factors:
        rank = self.active or len(self.lora_A)
        return Factors(self.lora_A[:rank], self.lora_B[:, :rank], self.alpha / rank)


class Nested(Around):
    """One b for all layers, as in the authors' code."""

    def draw(self, deltas: Sequence[Delta], generator: torch.Generator | None) -> None:
        nested = all_of(deltas, DyloraDelta)
        rank = None
        if generator is not None and nested:
            rank = int(torch.randint(1, len(nested[0].lora_A) + 1, (), generator=generator))
        for delta in nested:
            delta.active = rank


def fresh(weight: Weight, rank: int, alpha: float, generator: torch.Generator) -> DyloraDelta:
    """As a LoRA."""
    return DyloraDelta(*fresh_pair(weight.shape, rank, generator), alpha)
