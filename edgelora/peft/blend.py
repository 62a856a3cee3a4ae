"""Several adapters at their scales on one decoder: what the merged model of them must compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgelora.nn.awake import Awake
from edgelora.nn.decoder import Adaptable, Decoder
from edgelora.nn.linear import Delta, Linear, Weight, bias_of
from edgelora.nn.norm import Norm
from edgelora.nn.vocabulary import Vocabulary
from edgelora.peft.adapter import Adapter
from edgelora.peft.alora import waiting
from edgelora.peft.attached import delta_of
from edgelora.peft.layernorm import NormDelta
from edgelora.peft.saved import moved
from edgelora.peft.token_rows import blended


class BlendDelta(nn.Module):
    """x Wᵀ + Σ sᵢ (what the i-th delta makes of x and W, less x Wᵀ): each change is measured from the base's own W.

    So is each change of the bias from the base's own.
    """

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

    def of_bias(self, bias: Tensor | None) -> Tensor | None:
        changed = [(bias_of(delta, bias), scale) for delta, scale in self.parts]
        own = 0.0 if bias is None else bias
        changes = [scale * (one - own) for one, scale in changed if one is not None and one is not bias]
        return own + torch.stack(changes).sum(0) if changes else bias

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: a blend is not one adapter, and is not saved."""
        return {}


def blend(decoder: Decoder, adapters: Sequence[tuple[Adapter, float]]) -> None:
    """Make the adapters at their scales what the decoder computes, in place of whatever was on it."""
    decoder.awake = awake_of(adapters)
    blend_layers(decoder.adaptable, adapters, decoder.awake)


def awake_of(adapters: Sequence[tuple[Adapter, float]]) -> Awake | None:
    """What those among them that wait for their invocation share (aLoRA), which must be one thing; None: none."""
    invocations = {adapter.invocation for adapter, _ in adapters} - {()}
    if not invocations:
        return None
    (invocation,) = invocations
    return Awake(invocation)


@torch.no_grad()
def blend_layers(
    layers: Mapping[str, Adaptable], adapters: Sequence[tuple[Adapter, float]], awake: Awake | None = None
) -> None:
    """The same of some linear layers and norms, by their full HF names; nothing of the others' is read."""
    for name, layer in layers.items():
        own = [(adapter, scale) for adapter, scale in adapters if name in adapter.tensors]
        if not own:
            layer.delta = None
        elif isinstance(layer, Vocabulary):
            some = all(name in adapter.token_rows for adapter, _ in own)
            rows = [(*adapter.token_rows[name], scale) for adapter, scale in own] if some else []
            layer.delta = blended(rows, layer.weight) if some else moved(name, layer.weight, own)
        elif isinstance(layer, Linear):
            layer.delta = BlendDelta([(_delta(adapter, name, layer.weight, awake), scale) for adapter, scale in own])
        else:
            layer.delta = _blended_norm(layer, [(torch.from_numpy(a.norm(name)), scale) for a, scale in own])


def _delta(adapter: Adapter, name: str, weight: Weight, awake: Awake | None) -> Delta:
    delta = delta_of(adapter.change(name), weight)
    if not adapter.invocation:
        return delta
    waits = waiting(delta)
    waits.awake = awake
    return waits


def _blended_norm(norm: Norm, weights: Sequence[tuple[Tensor, float]]) -> NormDelta:
    blended = norm.weight.clone()
    for weight, scale in weights:
        blended += scale * (weight.to(blended.device) + norm.shift - norm.weight)
    return NormDelta(blended, norm.shift)
