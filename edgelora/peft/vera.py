"""VeRA (arXiv:2310.11454): y = x Wᵀ + b ∘ (x Aᵀ ∘ d) Bᵀ. A and B are random and shared by all layers; d and b learn."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edgelora.nn.linear import Factors, Weight
from edgelora.peft.defaults import Defaults, Sourced, always, no_alpha

D_START = 0.1  # as in the paper's runs and PEFT
DEFAULTS = Defaults(
    rank=Sourced(
        256, "PEFT's default: a VeRA trains one number for each rank, not a row and a column (arXiv:2310.11454)"
    ),
    alpha=no_alpha("a VeRA has none: its vectors are the scale"),
    rate=always(
        2e-2,
        "PEFT's example, over RoBERTa (github.com/huggingface/peft, examples/sequence_classification/VeRA.ipynb); "
        "of 1e-3, 4e-3 and this, 30 steps over SmolLM2-135M learned the most with it",
    ),
)


class Projections(nn.Module):
    """A (r, widest d_in) and B (tallest d_out, r), float32: a layer takes their first columns and rows."""

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.register_buffer("vera_A", a, persistent=False)  # drawn again from the seed
        self.register_buffer("vera_B", b, persistent=False)


class VeraDelta(nn.Module):
    """vera_lambda_d (r,) and vera_lambda_b (d_out,) float32 are trained.

    Keeps diag(d) A and diag(b) B of the layer for the backward pass: r (d_in + d_out) numbers.
    """

    def __init__(self, projections: Projections, shape: tuple[int, int]) -> None:
        super().__init__()
        self.projections, self.shape = projections, shape
        rank = len(projections.vera_A)
        self.vera_lambda_b = nn.Parameter(torch.zeros(shape[0]))
        self.vera_lambda_d = nn.Parameter(torch.full((rank,), D_START))

    @property
    def factors(self) -> Factors:
        own = self._matrices()
        return Factors(self.vera_lambda_d[:, None] * own["vera_A"], self.vera_lambda_b[:, None] * own["vera_B"], 1.0)

    def _matrices(self) -> dict[str, Tensor]:
        d_out, d_in = self.shape
        return {"vera_A": self.projections.vera_A[:, :d_in], "vera_B": self.projections.vera_B[:d_out]}

    def tensors(self) -> dict[str, Tensor]:
        own = {"vera_lambda_b": self.vera_lambda_b.detach(), "vera_lambda_d": self.vera_lambda_d.detach()}
        return own | self._matrices()


def together(weights: Sequence[Weight], rank: int, _: float, generator: torch.Generator) -> list[VeraDelta]:
    """One for each weight, over the same A and B (Kaiming uniform); b zero: they do nothing yet. There is no α."""
    d_out, d_in = (max(weight.shape[i] for weight in weights) for i in (0, 1))
    a, b = (
        torch.empty(shape).uniform_(-math.sqrt(6 / shape[1]), math.sqrt(6 / shape[1]), generator=generator)
        for shape in ((rank, d_in), (d_out, rank))
    )
    projections = Projections(a, b)
    return [VeraDelta(projections, weight.shape) for weight in weights]


def fresh(weight: Weight, rank: int, alpha: float, generator: torch.Generator) -> VeraDelta:
    """For one weight alone."""
    return together([weight], rank, alpha, generator)[0]
