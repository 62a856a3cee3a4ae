"""LoRA on a built model (arXiv:2106.09685): y = x Wᵀ + α/r (x Aᵀ) Bᵀ, with A random and B zero at the start."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from edgelora.nn.linear import Factors, Weight


class LoraDelta(nn.Module):
    """The trainable half: lora_A (r, d_in), lora_B (d_out, r), float32."""

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.lora_A, self.lora_B, self.scale = nn.Parameter(a), nn.Parameter(b), scale

    @property
    def factors(self) -> Factors:
        return Factors(self.lora_A, self.lora_B, self.scale)

    def tensors(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named_parameters()}


def fresh_pair(shape: tuple[int, int], rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A and B for a weight (d_out, d_in): A uniform in ±1/√d_in (Kaiming with a = √5, as PEFT), B zero."""
    d_out, d_in = shape
    bound = 1 / math.sqrt(d_in)
    return torch.empty(rank, d_in).uniform_(-bound, bound, generator=generator), torch.zeros(d_out, rank)


def fresh(weight: Weight, rank: int, alpha: float, generator: torch.Generator) -> LoraDelta:
    """A as torch initialises a linear, B zero: it does nothing yet (arXiv:2106.09685, section 4.1). Scaled by α/r."""
    return LoraDelta(*fresh_pair(weight.shape, rank, generator), alpha / rank)
