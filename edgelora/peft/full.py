"""Full fine-tuning: y = x (W + ΔW)ᵀ, ΔW (d_out, d_in) of every linear layer, embedding and head, and all norms' w (d,).

ΔW is trained, float32, and not W: W stays the base's (mapped from its file, where that has floats), to which weight
decay pulls and against which preferences are measured; and steps that a float32 W would round away add up. An
embedding or head that is stored in blocks is quantized again by a merge.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgelora.nn.linear import Weight
from edgelora.peft import remade


class FullDelta(nn.Module):
    """`delta` (d_out, d_in) float32 is trained. W + ΔW is made where it is read, into a buffer."""

    factors = None

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = nn.Parameter(delta)

    def forward(self, x: Tensor, weight: Weight) -> Tensor:
        return remade.product(x, weight, Sum, self.delta)

    def tensors(self) -> dict[str, Tensor]:
        return {"delta": self.delta.detach()}


class Sum:
    """W′ = W + ΔW (a `remade.Rule`)."""

    @staticmethod
    def weight(w: Tensor, out: Tensor, *parameters: Tensor) -> None:
        torch.add(w, parameters[0], out=out)

    @staticmethod
    def gradients(_: Tensor, g: Tensor, *__: Tensor) -> tuple[Tensor]:
        return (g,)


def fresh(weight: Weight, *_: object) -> FullDelta:
    """Zero: it does nothing yet. Raises ConfigError over a quantized weight."""
    remade.require_floats(weight, "full")
    return FullDelta(torch.zeros(weight.shape))
