"""Houlsby's adapters (arXiv:1902.00751): y + U gelu(D y + d) + u behind both projections back to the residual stream.

y = x Wᵀ (T, d_out) of o_proj and down_proj; D (r, d_out), d (r,), U (d_out, r), u (d_out,): 2 r d_out + r + d_out
numbers, the paper's 2md + d + m. What stands behind a norm of its own there (its layer norms are not trained here) goes
through it. A layer's frozen bias c is added behind: D c is a d.

gelu hangs on x, so no weight can hold it, and llama.cpp's files have no place for it: it trains and scores in torch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgelora.nn.linear import Weight, product
from edgelora.peft.defaults import Defaults, always, no_alpha

TARGETS = ("o_proj", "down_proj")
DEFAULTS = Defaults(
    alpha=no_alpha("Houlsby's adapters have none: what they add is not scaled"),
    rate=always(3e-4, "the authors' example, over BERT (arXiv:1902.00751, github.com/google-research/adapter-bert)"),
)
START = 1e-2  # the paper's: a normal distribution of this width, cut at two of them


class HoulsbyDelta(nn.Module):
    """adapter_D (r, d_out), adapter_d (r,), adapter_U (d_out, r), adapter_u (d_out,), float32.

    Keeps y (T, d_out) and D y (T, r) for the backward pass.
    """

    factors = None

    def __init__(self, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> None:
        super().__init__()
        self.adapter_D, self.adapter_d = nn.Parameter(down), nn.Parameter(down_bias)
        self.adapter_U, self.adapter_u = nn.Parameter(up), nn.Parameter(up_bias)

    def forward(self, x: Tensor, weight: Weight) -> Tensor:
        """x (T, d_in) → (T, d_out)."""
        y = product(x, weight)
        inner = F.gelu(F.linear(y, self.adapter_D.to(y.dtype), self.adapter_d.to(y.dtype)))
        return y + F.linear(inner, self.adapter_U.to(y.dtype), self.adapter_u.to(y.dtype))

    def tensors(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named_parameters()}


def shapes(d_out: int, _: int, rank: int) -> tuple[tuple[int, ...], ...]:
    """Of what is trained for one layer."""
    return (rank, d_out), (rank,), (d_out, rank), (d_out,)


def fresh(weight: Weight, rank: int, _: float, generator: torch.Generator) -> HoulsbyDelta:
    """D as in the paper, U zero where the paper has it near zero: it does nothing yet. It has no α."""
    d_out, _ = weight.shape
    down = nn.init.trunc_normal_(torch.empty(rank, d_out), 0, START, -2 * START, 2 * START, generator)
    return HoulsbyDelta(down, torch.zeros(rank), torch.zeros(d_out, rank), torch.zeros(d_out))
