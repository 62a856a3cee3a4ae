"""What PEFT trains whole beside a LoRA and saves so: biases (`bias`), and modules by name (`modules_to_save`).

y = x (W + ΔW)ᵀ + c of a linear layer, E + ΔE of the embedding and the head, w of a norm, c of a bias. ΔW (d_out, d_in)
and ΔE (V, d) are trained, float32, and W + ΔW is saved: weight decay pulls to the base, where PEFT's pulls W to zero.
A base with one matrix for embedding and head keeps one: whichever of them is named, both are it (PEFT's
`ensure_weight_tying`).
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgelora.architectures.layers import Layers
from edgelora.architectures.names import EMBEDDING, HEAD
from edgelora.errors import ConfigError
from edgelora.nn.decoder import Decoder
from edgelora.nn.linear import Delta, Factors, Linear, Weight, product
from edgelora.peft import remade
from edgelora.peft.adapter import Adapter
from edgelora.peft.full import FullDelta
from edgelora.peft.kind import BIAS, WHOLE
from edgelora.peft.method import Method
from edgelora.peft.strength import require_taken
from edgelora.peft.targets import Where

ROWS_AT_ONCE = 4096  # of a weight, in float32


class SavedDelta(FullDelta):
    """`delta` (d_out, d_in) float32 is trained, and `frozen` + `delta` is saved."""

    def __init__(self, frozen: Weight) -> None:
        super().__init__(torch.zeros(frozen.shape))
        self.frozen = frozen

    def tensors(self) -> dict[str, Tensor]:
        # a card that is full has no room for either of them in float32, and a frozen embedding may lie beside it
        whole = self.delta.detach().to("cpu", copy=True)
        for first in range(0, len(whole), ROWS_AT_ONCE):
            some = whole[first : first + ROWS_AT_ONCE]
            some += self.frozen.rows(first, first + len(some)).cpu()
        return {WHOLE: whole}


class BiasedDelta(nn.Module):
    """What `inner` computes, None: x Wᵀ; and `bias` (d_out,) float32 in the place of the layer's own."""

    def __init__(self, inner: Delta | None, bias: Tensor) -> None:
        super().__init__()
        self.inner, self.bias = inner, nn.Parameter(bias)

    @property
    def factors(self) -> Factors | None:
        return None if self.inner is None else self.inner.factors

    def forward(self, x: Tensor, weight: Weight) -> Tensor:
        return product(x, weight, self.inner)

    def of_bias(self, _: Tensor | None) -> Tensor:
        return self.bias

    def tensors(self) -> dict[str, Tensor]:
        return {**({} if self.inner is None else self.inner.tensors()), BIAS: self.bias.detach()}


def within(delta: Delta | None) -> Delta | None:
    """What a method put on a layer, without the bias that is trained beside it."""
    return delta.inner if isinstance(delta, BiasedDelta) else delta


def is_adapted(delta: object) -> bool:
    """Whether there is more on a layer than what is saved whole."""
    inner = delta.inner if isinstance(delta, BiasedDelta) else delta
    return inner is not None and not isinstance(inner, SavedDelta)


@dataclass(frozen=True)
class Beside:
    """What is trained whole beside what a method adapts, by HF's names."""

    linears: tuple[str, ...] = ()
    vocabularies: tuple[str, ...] = ()
    """One of a base with one matrix for both."""
    biases: tuple[str, ...] = ()
    """The linear layers whose bias is trained."""


def is_saved(module: str, where: Where) -> bool:
    """By PEFT's rule: as the text of its name ends."""
    return module.endswith(where.modules_to_save) if where.modules_to_save else False


def beside(row: Method, layers: Layers, adapted: Iterable[str], where: Where) -> Beside:
    """What is trained whole of a model with these layers, beside those that are `adapted`.

    Raises ConfigError for names that are no layer's, for biases where there are none, and for a method that has none of
    that beside it.
    """
    require_taken(row, where)
    matrices = layers.matrices
    _require_known([*layers.linears, *layers.norms, *matrices], where.modules_to_save)
    named = {name for name in matrices if name in row.vocabularies or is_saved(name, where)}
    if HEAD not in layers.vocabularies and HEAD in named:
        named = {EMBEDDING}
    linears = [name for name in layers.linears if is_saved(name, where)]
    biased = [name for name in layers.linears if name.split(".", 3)[3] in layers.biased]
    reached = {*linears, *(biased if where.bias == "all" else adapted if where.bias == "lora_only" else ())}
    biases = tuple(name for name in biased if name in reached)
    if where.bias != "none" and not set(biases) - set(linears):
        raise ConfigError(
            what=f"bias {where.bias}: no {'adapted ' * (where.bias != 'all')}layer of this model has a bias",
            why="PEFT trains the biases that a model has, and here these are none",
            fix="leave it out; --method bitfit trains biases, and gives one to every layer",
        )
    return Beside(tuple(linears), tuple(name for name in layers.vocabularies if name in named), biases)


def put_beside(decoder: Decoder, row: Method, found: Beside) -> None:
    """Let all that be trained, from the base's own on, behind what the method put on its layers. Raises ConfigError for
    a layer over quantized weights."""
    linears, matrices = decoder.linears, decoder.vocabularies
    for name in found.linears:
        remade.require_floats(linears[name].weight, f"{row.name} --modules-to-save {name.rpartition('.')[2]}")
        linears[name].delta = SavedDelta(linears[name].weight)
    for name in found.vocabularies:
        own = matrices[name].weight
        matrices[name].delta = SavedDelta(own) if row.peft_type == "LORA" else FullDelta(torch.zeros(own.shape))
    for name in found.biases:
        linears[name].delta = BiasedDelta(linears[name].delta, _bias(linears[name]))


def layers_of(decoder: Decoder) -> Layers:
    """Of a decoder."""
    return Layers(
        {name: linear.weight.shape for name, linear in decoder.linears.items()},
        {name: len(norm.weight) for name, norm in decoder.norms.items()},
        {name: one.weight.shape for name, one in decoder.vocabularies.items()},
        {name.split(".", 3)[3] for name, linear in decoder.linears.items() if linear.bias is not None},
    )


@torch.no_grad()
def moved(name: str, weight: Weight, adapters: Sequence[tuple[Adapter, float]]) -> FullDelta:
    """What adapters at their scales add to the embedding or the head `name`, each measured from the base's own."""
    own = weight.dequantize().cpu()
    delta = torch.zeros_like(own)
    for adapter, scale in adapters:
        if name in adapter.token_rows:
            ids, rows = (torch.from_numpy(one) for one in adapter.token_rows[name])
            delta[ids] += scale * (rows - own[ids])
        else:
            delta.add_(torch.from_numpy(adapter.change(name).change(own.numpy())), alpha=scale)
    return FullDelta(delta)


def _bias(linear: Linear) -> Tensor:
    assert linear.bias is not None
    return linear.bias.detach().to(torch.float32).clone()


def _require_known(names: Collection[str], saved: Sequence[str]) -> None:
    unknown = [one for one in saved if not any(name.endswith(one) for name in names)]
    if not unknown:
        return
    there = sorted({name.rpartition(".")[2] for name in names})
    near = [found for one in unknown for found in difflib.get_close_matches(one.rpartition(".")[2], there, 1)]
    raise ConfigError(
        what=f"modules_to_save: no layer of this model is named {', '.join(unknown)}",
        why=f"its layers are {', '.join(there)}",
        fix=f"did you mean {', '.join(near)}?" if near else "name some of these",
    )
