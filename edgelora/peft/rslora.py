"""Rank-stabilized LoRA (arXiv:2312.03732): a LoRA scaled by α/√r, under which gradients do not fade as r grows."""

from __future__ import annotations

import math

import torch

from edgelora.nn.linear import Weight
from edgelora.peft.defaults import RANK, SCALE_AT_RANK, Defaults, Sourced
from edgelora.peft.lora import LoraDelta, fresh_pair

DEFAULTS = Defaults(
    alpha=lambda _: Sourced(
        SCALE_AT_RANK * RANK**0.5,
        f"α/√r is {SCALE_AT_RANK:g} at r {RANK}, as a LoRA's, and holds gradients steady (arXiv:2312.03732)",
    )
)


def fresh(weight: Weight, rank: int, alpha: float, generator: torch.Generator) -> LoraDelta:
    """As a LoRA, scaled by α/√r (arXiv:2312.03732)."""
    return LoraDelta(*fresh_pair(weight.shape, rank, generator), alpha / math.sqrt(rank))
