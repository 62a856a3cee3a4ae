"""aLoRA (arXiv:2504.12397): y = x Wᵀ + α/r m ∘ (x Aᵀ) Bᵀ, with m (T, 1) 1 from the invocation on and 0 before it.

The invocation is the last place in a sequence where certain tokens begin (PEFT's `alora_invocation_tokens`). What is
before it is computed as the base does it: its keys and values serve the base and every other aLoRA as well. Without
such tokens it is a LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgelora.nn.awake import Awake, awake_lora
from edgelora.nn.decoder import Decoder
from edgelora.nn.dropped import Drop, dropped_lora
from edgelora.nn.linear import Delta, Factors, Weight
from edgelora.peft.defaults import Defaults, Sourced
from edgelora.peft.dropout import bare
from edgelora.peft.lora import LoraDelta, fresh_pair

DEFAULTS = Defaults(
    rank=Sourced(32, "PEFT's example of an aLoRA (github.com/huggingface/peft, examples/alora_finetuning)")
)


class AloraDelta(LoraDelta):
    """A LoRA on the tokens that `awake` says; on all of them where there is none."""

    awake: Awake | None = None

    @property
    def factors(self) -> Factors | None:  # type: ignore[override]
        return super().factors if self.awake is None else None

    def forward(self, x: Tensor, weight: Weight) -> Tensor:
        """x (T, d_in) → (T, d_out)."""
        assert self.awake is not None
        assert self.awake.rows is not None
        return awake_lora(x, weight, Factors(self.lora_A, self.lora_B, self.scale), self.awake.rows)

    def dropped(self, x: Tensor, weight: Weight, drop: Drop) -> Tensor:
        rows = None if self.awake is None else self.awake.rows
        return dropped_lora(x, weight, Factors(self.lora_A, self.lora_B, self.scale), drop, rows)


def fresh(weight: Weight, rank: int, alpha: float, generator: torch.Generator) -> AloraDelta:
    """As a LoRA."""
    return AloraDelta(*fresh_pair(weight.shape, rank, generator), alpha / rank)


def waiting(delta: Delta) -> AloraDelta:
    """A LoRA from a file as one that can wait."""
    assert delta.factors is not None
    return AloraDelta(*delta.factors)


def wait(decoder: Decoder, invocation: Sequence[int]) -> None:
    """Let the aLoRA on `decoder` act from the last place on where a sequence has these tokens."""
    decoder.awake = Awake(invocation)
    for linear in decoder.linears.values():
        if isinstance(delta := bare(linear.delta), AloraDelta):
            delta.awake = decoder.awake
