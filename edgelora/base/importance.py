"""An importance matrix in torch: what goes into each product of a decoder, whatever adapter is on it.

The names are those of the GGUF that the model is or will be, so that either engine's sums serve the other's file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from edgelora.architectures.names import EMBEDDING, HEAD, gguf_place
from edgelora.base.activations import ActivationSums
from edgelora.base.model import Base
from edgelora.nn.decoder import Decoder
from edgelora.nn.linear import Delta, Factors, Linear, Weight, bias_of, lora
from edgelora.nn.mixture import Mixture


class _Watched:
    """In a linear layer's place: adds what goes in, then computes what the layer's own delta does."""

    factors: Factors | None = None

    def __init__(self, inner: Delta | None, sums: ActivationSums, tensor: str) -> None:
        self.inner, self.sums, self.tensor = inner, sums, tensor

    def __call__(self, x: Tensor, weight: Weight) -> Tensor:
        _add(self.sums, self.tensor, x)
        if self.inner is None:
            return _times(x, weight)
        return self.inner(x, weight) if self.inner.factors is None else lora(x, weight, self.inner.factors)

    def of_bias(self, bias: Tensor | None) -> Tensor | None:
        return bias_of(self.inner, bias)

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.inner is None else self.inner.tensors()


def watched_tensors(base: Base, output: bool = False) -> dict[str, int]:
    """The tensors that llama-imatrix watches, with how many experts are stacked in each, or 1: those of the layers.

    `output`: also the head, which is the embedding where the two are tied.
    """
    matrices = dict.fromkeys(map(base.tensor_of, base.linears), 1)
    for i in range(base.config.num_hidden_layers):
        for name in base.architecture.expert_matrices(base.config):
            place = gguf_place(base.architecture, base.config, f"model.layers.{i}.{name}.weight")
            matrices[place.name] = 1 if place.expert is None else base.config.num_experts
    if output:
        matrices[_head(base)] = 1
    return matrices


def collect_importance(
    decoder: Decoder,
    base: Base,
    sequences: Sequence[np.ndarray],
    output: bool = False,
    on_sequence: Callable[[int], object] = lambda _: None,
) -> ActivationSums:
    """Evaluate each sequence of ids (n,) by itself; `on_sequence` hears of its n tokens.

    Raises BaseModelError for activations that are not numbers. The experts of a mixture are computed twice.
    """
    sums = ActivationSums(watched_tensors(base, output))
    with torch.no_grad(), _watching(decoder, base, sums):
        for ids in sequences:
            decoder(torch.from_numpy(ids), torch.arange(len(ids)), [0, len(ids)])
            on_sequence(len(ids))
    return sums


def _head(base: Base) -> str:
    return base.tensor_of(EMBEDDING if base.config.tie_word_embeddings else HEAD)


def _times(x: Tensor, weight: Weight) -> Tensor:
    return F.linear(x, weight.dequantize(x.dtype))


def _add(sums: ActivationSums, tensor: str, x: Tensor, matrix: int = 0) -> None:
    """x (T, columns)."""
    sums.add(tensor, x.square().sum(0, dtype=torch.float64).numpy(), len(x), matrix)


@contextmanager
def _watching(decoder: Decoder, base: Base, sums: ActivationSums) -> Iterator[None]:
    linears = decoder.linears
    deltas = {name: linear.delta for name, linear in linears.items()}
    hooks = []
    try:
        for name, linear in linears.items():
            _put(linear, _Watched(linear.delta, sums, base.tensor_of(name)))
        for name, module in decoder.named_modules():
            if isinstance(module, Mixture):
                hooks.append(
                    module.register_forward_pre_hook(partial(_add_mixture, base, sums, int(name.split(".")[2])))
                )
        if (head := _head(base)) in sums.matrices:
            hooks.append(decoder.model.norm.register_forward_hook(lambda *io: _add(sums, head, io[2])))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, linear in linears.items():
            _put(linear, deltas[name])


def _put(linear: Linear, delta: Delta | None) -> None:
    """Give a linear layer this delta. torch keeps modules apart, and exchanges one for nothing but another."""
    del linear.delta
    linear.delta = delta


def _add_mixture(base: Base, sums: ActivationSums, layer: int, mixture: Mixture, inputs: tuple[Any, ...]) -> None:
    """Add what the router and each expert see of x (T, d), by the router's own choice."""
    (x,) = inputs
    names = base.architecture.experts
    assert names is not None
    prefix = f"model.layers.{layer}"

    def add(module: str, seen: Tensor, matrix: int = 0) -> None:
        place = gguf_place(base.architecture, base.config, f"{prefix}.{module}.weight")
        _add(sums, place.name, seen, matrix)

    add(names.router, x)
    chosen = _times(x.float(), mixture.router).topk(mixture.per_token, -1).indices  # (T, k)
    for i, expert in enumerate(mixture.experts):
        seen = x[(chosen == i).any(-1)]
        up = _times(seen, expert.up)
        hidden = mixture.gate.plain(_times(seen, expert.gate), up)
        for name, into in ((names.gate, seen), (names.up, seen), (names.down, hidden)):
            add(f"{names.experts}.{i}.{name}", into, i)
