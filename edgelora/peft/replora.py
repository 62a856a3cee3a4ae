"""RepLoRA (arXiv:2502.03044): a LoRA whose A and B are made by small networks while it learns, and kept without them.

Of one linear layer, with a matrix P (r, r) that both networks see, and r hidden units in each:

    A  = gelu(P V_A + c_A) / √r · U_A   (r, d_in)
    Bᵀ = gelu(P V_B + c_B) / √r · U_B   (r, d_out)      y = x Wᵀ + s (x Aᵀ) Bᵀ

All ranks go through the same network, each with its own row of P. The paper's idea, not its code: that light networks
before A and B spare data. Which layers share a network, and its width, are choices made here: each layer has its own.
What is trained is what a LoRA of this rank trains, and 3 r² + 2 r numbers more.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgelora.nn.linear import Factors, Weight
from edgelora.peft.lora import fresh_pair


class Network(nn.Module):
    """hidden (r, r), bias (r,) and out (r, d), float32: (r, r) → (r, d)."""

    def __init__(self, hidden: Tensor, out: Tensor) -> None:
        super().__init__()
        self.hidden, self.bias = nn.Parameter(hidden), nn.Parameter(hidden.new_zeros(len(hidden)))
        self.out = nn.Parameter(out)

    def units(self, p: Tensor) -> Tensor:
        """(r, r): of each row what the hidden units make."""
        return F.gelu(p @ self.hidden + self.bias) / math.sqrt(len(self.bias))

    def forward(self, p: Tensor) -> Tensor:
        return self.units(p) @ self.out


class RepLoraDelta(nn.Module):
    """P (r, r) and the networks of A and B are trained, float32.

    Keeps A and B, r (d_in + d_out) numbers, for the backward pass.
    """

    def __init__(self, p: Tensor, of_a: Network, of_b: Network, scale: float) -> None:
        super().__init__()
        self.P, self.of_A, self.of_B, self.scale = nn.Parameter(p), of_a, of_b, scale

    @property
    def factors(self) -> Factors:
        return Factors(self.of_A(self.P), self.of_B(self.P).T, self.scale)

    def tensors(self) -> dict[str, Tensor]:
        """A LoRA of rank r: the networks are folded away."""
        a, b, _ = self.factors
        return {"lora_A": a.detach(), "lora_B": b.detach().contiguous()}


@torch.no_grad()
def fresh(weight: Weight, rank: int, alpha: float, generator: torch.Generator) -> RepLoraDelta:
    """P and V normal; U_A such that A is as large as a LoRA's at its start, U_B zero: it does nothing yet. s = α/r."""
    p = torch.randn(rank, rank, generator=generator)
    of_a, of_b = (
        Network(torch.randn(rank, rank, generator=generator) / math.sqrt(rank), out)
        for out in (fresh_pair(weight.shape, rank, generator)[0], torch.zeros(rank, weight.shape[0]))
    )
    of_a.out.mul_(math.sqrt(rank) / of_a.units(p).norm())  # whose rows are 1 long then, on average
    return RepLoraDelta(p, of_a, of_b, alpha / rank)
