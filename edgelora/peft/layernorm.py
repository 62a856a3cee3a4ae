"""LayerNorm tuning (arXiv:2312.11420): y = x / rms(x) ∘ w. The weights w (d,) of all norms are trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class NormDelta(nn.Module):
    """`weight` (d,) float32 in the place of a norm's own; what is saved is HF's, which lacks the family's `shift`."""

    def __init__(self, weight: Tensor, shift: float = 0.0) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(weight), shift

    def tensors(self) -> dict[str, Tensor]:
        weight: Tensor = self.weight.detach() - self.shift
        return {"weight": weight}


def fresh(weight: Tensor, shift: float) -> NormDelta:
    """The frozen weight itself: it does nothing yet."""
    return NormDelta(weight.detach().clone().to(torch.float32), shift)
