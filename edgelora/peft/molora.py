"""MoLoRA (arXiv:2309.05444): E LoRAs and a router that weighs them for each token, x Wᵀ + s Σₑ gₑ(x) x Aₑᵀ Bₑᵀ.

g(x) = softmax(x Rᵀ) (T, E), R (E, d_in): all experts work for every token, which the paper calls soft merging. Their A
(r, d_in) and B (d_out, r) lie beside each other and share the rank r, so that as many numbers are trained as with a
LoRA, and E d_in more; Σₑ is one product, (g(x) over its ranks ∘ x Aᵀ) Bᵀ.

The weights of the sum hang on the token, and llama.cpp adds an adapter with one for all: it trains and scores in torch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgelora.nn.linear import Weight, product
from edgelora.peft.lora import fresh_pair
from edgelora.peft.multilora import groups_of

EXPERTS = 4


class MoLoraDelta(nn.Module):
    """lora_A (r, d_in), lora_B (d_out, r) and router (E, d_in) float32 are trained; saved with the scale in B.

    Keeps x, x Aᵀ (T, r) and g (T, E), over the ranks too, for the backward pass.
    """

    factors = None
    groups: Tensor

    def __init__(self, a: Tensor, b: Tensor, router: Tensor, scale: float) -> None:
        super().__init__()
        self.lora_A, self.lora_B, self.router = nn.Parameter(a), nn.Parameter(b), nn.Parameter(router)
        self.scale = scale
        self.register_buffer("groups", groups_of(len(a), len(router)), persistent=False)

    def forward(self, x: Tensor, weight: Weight) -> Tensor:
        """x (T, d_in) → (T, d_out)."""
        gates = F.linear(x, self.router.to(x.dtype)).softmax(-1)  # (T, E)
        through = F.linear(x, self.lora_A.to(x.dtype)) * gates[:, self.groups]  # (T, r)
        return product(x, weight) + self.scale * F.linear(through, self.lora_B.to(x.dtype))

    def tensors(self) -> dict[str, Tensor]:
        saved = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return saved | {"lora_B": saved["lora_B"] * self.scale}


def shapes(d_out: int, d_in: int, rank: int) -> tuple[tuple[int, ...], ...]:
    """Of what is trained for one layer."""
    return (rank, d_in), (d_out, rank), (min(EXPERTS, rank), d_in)


def fresh(weight: Weight, rank: int, alpha: float, generator: torch.Generator) -> MoLoraDelta:
    """Every A as a LoRA's and B zero: it does nothing yet. R is zero: the experts begin with equal weights, and part as
    their A are others. Scaled by α/r."""
    a, b = fresh_pair(weight.shape, rank, generator)
    return MoLoraDelta(a, b, torch.zeros(min(EXPERTS, rank), weight.shape[1]), alpha / rank)
