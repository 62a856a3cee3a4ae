"""A start (A₀, B₀) that is taken from W itself, without changing W: y = x Wᵀ + s x (B A − B₀ A₀)ᵀ.

The papers subtract s B₀A₀ from W and train the rest. Here the base keeps its own weights, so that one file of it, in
whatever blocks, serves every adapter. Written with how far each factor has gone, A = A₀ + A′ and B = B₀ + B′,

    B A − B₀ A₀ = B′ (A₀ + A′) + B₀ A′ = [B′, B₀] [A₀ + A′; A′]

is a LoRA of rank 2r. It is nothing to the last bit where A′ and B′ are zero, and no large products are subtracted from
each other: [B, −B₀] [A; A₀], which PEFT writes, loses in 16 bits what was learned.

Under dropout A sees drop(x) and A₀ all of x, as in PEFT: y = x Wᵀ + s drop(x) (B A)ᵀ − s x (B₀ A₀)ᵀ. At first this is
the base with noise in the directions of the start; PiSSA's authors therefore leave it out (github.com/GraphPKU/PiSSA).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgelora.errors import ConfigError
from edgelora.nn.dropped import Drop, dropped_lora
from edgelora.nn.linear import Factors, Weight


class StartedDelta(nn.Module):
    """moved_A (r, d_in) and moved_B (d_out, r), float32 and zero at first, are trained; start_A and start_B stay.

    Their gradients are those of A and B, so Adam takes the steps that it would take for these; weight decay pulls
    towards the base. Keeps both factors, put together, for the backward pass: 2r (d_in + d_out) numbers.
    """

    start_A: Tensor
    start_B: Tensor

    def __init__(self, start_a: Tensor, start_b: Tensor, scale: float) -> None:
        super().__init__()
        self.register_buffer("start_A", start_a)
        self.register_buffer("start_B", start_b)
        self.moved_A, self.moved_B = nn.Parameter(torch.zeros_like(start_a)), nn.Parameter(torch.zeros_like(start_b))
        self.scale = scale

    @property
    def factors(self) -> Factors:
        a = torch.cat([self.start_A + self.moved_A, self.moved_A])  # (2r, d_in)
        b = torch.cat([self.moved_B, self.start_B], 1)  # (d_out, 2r)
        return Factors(a, b, self.scale)

    def dropped(self, x: Tensor, weight: Weight, drop: Drop) -> Tensor:
        own = Factors(self.start_A + self.moved_A, self.start_B + self.moved_B, self.scale)
        start = F.linear(F.linear(x, self.start_A.to(x.dtype)), self.start_B.to(x.dtype))
        return dropped_lora(x, weight, own, drop) - self.scale * start

    def tensors(self) -> dict[str, Tensor]:
        """A LoRA of rank 2r over the base as it is."""
        a, b, _ = self.factors
        return {"lora_A": a.detach(), "lora_B": b.detach()}


def require_rank(weight: Weight, rank: int, method: str) -> None:
    """Raise ConfigError if W has fewer than `rank` directions to start from."""
    if rank > min(weight.shape):
        d_out, d_in = weight.shape
        raise ConfigError(
            what=f"rank {rank}: {method} takes its start from the weights, and one is only {d_out} x {d_in}",
            why=f"such a matrix has no more than {min(weight.shape)} directions",
            fix=f"take --rank {min(weight.shape)} or less, or --method lora",
        )
