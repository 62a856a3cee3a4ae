"""MultiLoRA (arXiv:2311.11501): n LoRAs side by side, so that no few directions lead: x Wᵀ + s Σᵢ cᵢ ∘ (x Aᵢᵀ Bᵢᵀ)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from edgelora.nn.linear import Factors, Weight

PARALLEL = 3


class MultiLoraDelta(nn.Module):
    """lora_A (r, d_in) and lora_B (d_out, r), those of the n LoRAs beside each other, and scaling (n, d_out), float32.

    Keeps lora_B as it is scaled (d_out, r) for the backward pass.
    """

    groups: Tensor

    def __init__(self, a: Tensor, b: Tensor, scaling: Tensor, scale: float) -> None:
        super().__init__()
        self.lora_A, self.lora_B, self.scaling = nn.Parameter(a), nn.Parameter(b), nn.Parameter(scaling)
        self.scale = scale
        self.register_buffer("groups", groups_of(len(a), len(scaling)), persistent=False)

    @property
    def factors(self) -> Factors:
        return Factors(self.lora_A, self.lora_B * self.scaling[self.groups].T, self.scale)

    def tensors(self) -> dict[str, Tensor]:
        """A LoRA of rank r: concatenated, and scaled."""
        return {"lora_A": self.lora_A.detach(), "lora_B": self.factors.b.detach()}


def groups_of(rank: int, n: int) -> Tensor:
    """Which of `n` LoRAs each of `rank` columns belongs to (rank,): as many to each, or one less."""
    return torch.arange(rank) * n // rank


def fresh(weight: Weight, rank: int, alpha: float, generator: torch.Generator) -> MultiLoraDelta:
    """A and B as torch initialises a linear; the scaling is zero: it does nothing yet, as in the paper.

    The rank is that of all of them together, so that as many numbers are trained as with a LoRA, and n d_out more.
    """
    d_out, d_in = weight.shape
    n = min(PARALLEL, rank)
    a, b = torch.empty(rank, d_in), torch.empty(d_out, rank)
    a.uniform_(-1 / math.sqrt(d_in), 1 / math.sqrt(d_in), generator=generator)
    inner = math.sqrt(-(-rank // n))  # the columns of one B
    b.uniform_(-1 / inner, 1 / inner, generator=generator)
    return MultiLoraDelta(a, b, torch.zeros(n, d_out), alpha / rank)
