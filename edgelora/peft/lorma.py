"""LoRMA (arXiv:2506.07621), its additive form LoRMA₊: a weight is multiplied, W′ = (I + s B A) W, instead of added to.

y = x Wᵀ + s (x (A W)ᵀ) Bᵀ with A (r, d_out) and B (d_out, r): the LoRA whose own A is A W (r, d_in), exactly. That is
made once for a micro-batch, r d_out d_in products and W dequantized once more; x Wᵀ Aᵀ would take fewer, but keep x Wᵀ
(T, d_out) of every layer for the backward pass. The other form, LoRMA_π, is `lorma_pi.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from edgelora.nn.linear import Factors, Weight
from edgelora.peft.defaults import MOST, Defaults, Sourced, by_size

AUTHORS = Sourced(5e-4, "the authors' over Llama-3-8B (arXiv:2506.07621, github.com/Exploration-Lab/LoRMA)")
DEFAULTS = Defaults(rate=by_size(Sourced(1e-4, MOST), AUTHORS))


class LormaDelta(nn.Module):
    """lora_A (r, d_out) and lora_B (d_out, r) float32 are trained.

    Keeps A W (r, d_in) of the layer for the backward pass.
    """

    def __init__(self, a: Tensor, b: Tensor, scale: float, weight: Weight) -> None:
        super().__init__()
        self.lora_A, self.lora_B, self.scale, self.weight = nn.Parameter(a), nn.Parameter(b), scale, weight

    @property
    def factors(self) -> Factors:
        return Factors(Through.apply(self.lora_A, self.weight), self.lora_B, self.scale)  # type: ignore[no-untyped-call]

    def tensors(self) -> dict[str, Tensor]:
        """A LoRA of rank r, over these very weights."""
        return {"lora_A": self.factors.a.detach(), "lora_B": self.lora_B.detach()}


class Through(torch.autograd.Function):
    """A W (r, d_in) of A (r, d_out), in A's dtype; the backward dequantizes W again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Weight) -> Tensor:
        ctx.weight = weight
        return a @ weight.dequantize(a.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (d,) = grads
        return d @ ctx.weight.dequantize(d.dtype).T, None


def fresh(weight: Weight, rank: int, alpha: float, generator: torch.Generator) -> LormaDelta:
    """A zero, B uniform in ±1/√r, as the authors' code has it: it does nothing yet. Scaled by α/r."""
    d_out, _ = weight.shape
    bound = 1 / math.sqrt(rank)
    b = torch.empty(d_out, rank).uniform_(-bound, bound, generator=generator)
    return LormaDelta(torch.zeros(rank, d_out), b, alpha / rank, weight)
