"""LoRA-XS (arXiv:2405.17604): y = x Wᵀ + s x (U S R Vᵀ)ᵀ. U, S and Vᵀ are the r leading ones of W; R is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgelora.nn.linear import Factors, Weight
from edgelora.peft.defaults import Defaults, always
from edgelora.peft.pissa import leading
from edgelora.peft.start import require_rank

DEFAULTS = Defaults(
    rate=always(
        4e-3,
        "the authors' over Mistral-7B; over Llama-3-8B 2e-3 (arXiv:2405.17604, github.com/MohammadrezaBanaei/LoRA-XS)",
    )
)


class LoraXsDelta(nn.Module):
    """R (r, r) float32 is trained, between right = Vᵀ (r, d_in) and left = U S (d_out, r), which stay.

    Keeps left R (d_out, r) for the backward pass.
    """

    left: Tensor
    right: Tensor

    def __init__(self, left: Tensor, right: Tensor, scale: float) -> None:
        super().__init__()
        self.register_buffer("left", left)
        self.register_buffer("right", right)
        self.R = nn.Parameter(left.new_zeros(left.shape[1], left.shape[1]))
        self.scale = scale

    @property
    def factors(self) -> Factors:
        return Factors(self.right, self.left @ self.R, self.scale)

    def tensors(self) -> dict[str, Tensor]:
        """A LoRA of rank r: one that PEFT and llama.cpp read, larger than R."""
        return {"lora_A": self.right, "lora_B": self.factors.b.detach()}


def fresh(weight: Weight, rank: int, alpha: float, generator: torch.Generator) -> LoraXsDelta:
    """R zero: it does nothing yet, and its gradient is not zero. The paper draws it with a deviation of 1e-5."""
    require_rank(weight, rank, "LoRA-XS")
    u, s, vt = leading(weight.dequantize(), rank, generator)
    return LoraXsDelta(u * s, vt, alpha / rank)
