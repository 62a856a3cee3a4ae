"""Several adapters at their scales on one decoder: what the merged model of them must compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgelora.nn.decoder import Decoder
from edgelora.nn.linear import Delta, Linear, Weight
from edgelora.peft.adapter import Adapter
from edgelora.peft.inject import delta_of


class BlendDelta(nn.Module):
    """x Wᵀ + Σ sᵢ (what the i-th delta makes of x and W, less x Wᵀ): each change is measured from the base's own W."""

    factors = None

    def __init__(self, parts: Sequence[tuple[Delta, float]]) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor, weight: Weight) -> Tensor:
        """x (T, d_in) → (T, d_out)."""
        plain = F.linear(x, weight.dequantize(x.dtype))
        blended = plain.clone()
        for delta, scale in self.parts:
            if (pair := delta.factors) is None:
                blended += scale * (delta(x, weight) - plain)
            else:
                blended += F.linear(F.linear(x, pair.a.to(x.dtype)), pair.b.to(x.dtype)) * (scale * pair.scale)
        return blended

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: a blend is not one adapter, and is not saved."""
        return {}


def blend(decoder: Decoder, adapters: Sequence[tuple[Adapter, float]]) -> None:
    """Make the adapters at their scales what the decoder computes, in place of whatever was on it."""
    blend_linears(decoder.linears, adapters)


@torch.no_grad()
def blend_linears(linears: Mapping[str, Linear], adapters: Sequence[tuple[Adapter, float]]) -> None:
    """The same of some linear layers, by their full HF names; nothing of the others' is read."""
    for name, linear in linears.items():
        parts = [
            (delta_of(adapter.pair(name), linear.weight), scale) for adapter, scale in adapters
            if name in adapter.tensors
        ]  # fmt: skip
        linear.delta = BlendDelta(parts) if parts else None
