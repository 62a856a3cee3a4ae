"""LoRS (arXiv:2501.08582): a LoRA that keeps a pruned model's zeros, W′ = W + M ∘ (s B A), M = 1 where W is not 0.

M is read off W whenever it is needed, and not kept; nor is W′. The gradients of A and B are those of the masked
product, B's s (M ∘ G) Aᵀ of G = dyᵀ x (d_out, d_in); the authors' code leaves M out of them, and so needs no G. Nor is
their start here, which takes A and B from gradients: they begin as a LoRA's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgelora.nn.linear import Weight
from edgelora.peft import remade
from edgelora.peft.lora import fresh_pair


class LorsDelta(nn.Module):
    """lora_A (r, d_in) and lora_B (d_out, r) float32 are trained; saved with the scale in B."""

    factors = None

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.lora_A, self.lora_B, self.scale = nn.Parameter(a), nn.Parameter(b), scale

    def forward(self, x: Tensor, weight: Weight) -> Tensor:
        return remade.product(x, weight, Masked(self.scale), self.lora_A, self.lora_B)

    def tensors(self) -> dict[str, Tensor]:
        return {"lora_A": self.lora_A.detach(), "lora_B": self.lora_B.detach() * self.scale}


class Masked:
    """W′ = W + M ∘ (s B A) (a `remade.Rule`)."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def weight(self, w: Tensor, out: Tensor, *parameters: Tensor) -> None:
        a, b = parameters
        mask = w != 0
        torch.addmm(w, b, a, alpha=self.scale, out=out)
        out.mul_(mask)

    def gradients(self, w: Tensor, g: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        a, b = parameters
        g.mul_(w != 0).mul_(self.scale)
        return b.T @ g, g @ a.T


def fresh(weight: Weight, rank: int, alpha: float, generator: torch.Generator) -> LorsDelta:
    """A as a LoRA's, B zero: it does nothing yet. Scaled by α/r. Raises ConfigError over a quantized weight."""
    remade.require_floats(weight, "lors")
    return LorsDelta(*fresh_pair(weight.shape, rank, generator), alpha / rank)
