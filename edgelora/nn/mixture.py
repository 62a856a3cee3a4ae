"""A mixture of experts: each token goes through the few experts that its router prefers (arXiv:2401.04088)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from edgelora.nn.activations import GATES
from edgelora.nn.linear import FrozenLinear, Weight


class Expert(NamedTuple):
    """The three matrices of one expert: gate and up (ff, d), down (d, ff)."""

    gate: Weight
    up: Weight
    down: Weight


class Mixture(nn.Module):
    """x (T, d) → (T, d): the sum of the `per_token` best experts' answers, weighted by the router's probabilities.

    `normalize`: the weights of the chosen experts are made to sum to one.
    """

    def __init__(self, router: Weight, experts: Sequence[Expert], per_token: int, normalize: bool, act: str) -> None:
        super().__init__()
        self.router, self.experts, self.gate = router, experts, GATES[act]
        self.per_token, self.normalize = per_token, normalize

    def forward(self, x: Tensor) -> Tensor:
        probabilities = FrozenLinear.apply(x.float(), self.router).softmax(-1)  # (T, E)
        weights, chosen = probabilities.topk(self.per_token, dim=-1)  # (T, k)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x, dtype=torch.float32)
        for i, expert in enumerate(self.experts):
            tokens, rank = (chosen == i).nonzero(as_tuple=True)
            if len(tokens):
                seen = x[tokens]
                up = FrozenLinear.apply(seen, expert.up)
                hidden = self.gate.function.apply(FrozenLinear.apply(seen, expert.gate), up)
                answer = FrozenLinear.apply(hidden, expert.down)
                out = out.index_add(0, tokens, answer * weights[tokens, rank, None])
        return out
