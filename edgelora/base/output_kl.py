"""How far a decoder's output moves when a weight of it is exchanged: the KL from what it said before.

A weight of layer L changes nothing before L: whoever walks the layers in order keeps the hidden state that enters each
one, and every exchange costs only the layers from there on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from edgelora.architectures.names import EMBEDDING, HEAD
from edgelora.base.model import Base
from edgelora.nn.decoder import Decoder
from edgelora.nn.linear import Weight
from edgelora.nn.rotary import tables_of


class OutputKL:
    """The output of `decoder` as it is now, at the `scored` positions of each of `windows`, int64 (n, T) ids.

    Keeps its log-probabilities, float32 (n · len(scored), V), and the hidden state that enters one layer.
    """

    def __init__(self, decoder: Decoder, windows: np.ndarray, scored: np.ndarray) -> None:
        n, size = windows.shape
        self.decoder = decoder
        self.ids = torch.from_numpy(np.ascontiguousarray(windows).reshape(-1))  # (n · T,)
        self.positions = torch.from_numpy((np.arange(n)[:, None] * size + scored).reshape(-1))
        self.starts = [i * size for i in range(n + 1)]
        self.tables = tables_of(decoder.config, torch.arange(n * size) % size, self.starts)
        with torch.no_grad():
            self.reference = self._log_p(self._through(0, self.embedded()))

    def layers(self) -> Iterator[tuple[int, Tensor]]:
        """Each layer's number and the hidden state (n · T, d) that enters it, with the weights of that moment."""
        x, n_layers = self.embedded(), len(self.decoder.model.layers)
        for i in range(n_layers):
            yield i, x
            with torch.no_grad():
                x = self._through(i, x, i + 1)
        yield n_layers, x

    def from_layer(self, first: int, x: Tensor) -> float:
        """Mean KL(before ‖ now) in nats over the positions, the state `x` entering layer `first`."""
        with torch.no_grad():
            difference = self._log_p(self._through(first, x)).neg_().add_(self.reference)
            kl = (difference * self.reference.exp()).sum(-1)
        return float(kl.mean())

    def whole(self) -> float:
        """The same of the whole decoder, embedding and all."""
        return self.from_layer(0, self.embedded())

    def embedded(self) -> Tensor:
        """What enters the first layer, with the embedding of this moment, (n · T, d)."""
        x = self.decoder.embedding.gather(self.ids)
        return x * self.decoder.config.embedding_multiplier

    def _through(self, first: int, x: Tensor, last: int | None = None) -> Tensor:
        for layer in list(self.decoder.model.layers)[first:last]:
            x = layer(x, self.tables, self.starts, 0)
        return x

    def _log_p(self, x: Tensor) -> Tensor:
        hidden = self.decoder.model.norm(x[self.positions]) / self.decoder.config.logits_scaling
        return torch.log_softmax(self.decoder.logits_of(hidden), -1)


class Slot(NamedTuple):
    """Where a GGUF tensor is used: its HF name, and the first layer behind it that it changes."""

    hf_name: str
    layer: int

    @property
    def embeds(self) -> bool:
        return self.hf_name == EMBEDDING


def slots(base: Base) -> dict[str, Slot]:
    """Every matrix that can be exchanged, by its GGUF name, from the embedding to the head. Experts cannot."""
    found = {base.tensor_of(EMBEDDING): Slot(EMBEDDING, 0)}
    found |= {base.tensor_of(name): Slot(name, int(name.split(".")[2])) for name in base.linears}
    if not base.config.tie_word_embeddings:
        found[base.tensor_of(HEAD)] = Slot(HEAD, base.config.num_hidden_layers)
    return found


@contextmanager
def exchanged(decoder: Decoder, slot: Slot, weight: Weight) -> Iterator[None]:
    """In here the matrix of `slot` is `weight`, (d_out, d_in) in HF's row order; a tied head with its embedding."""
    before: tuple[Weight, Weight] = decoder.embedding, decoder.head
    linear = decoder.linears.get(slot.hf_name)
    own = None if linear is None else linear.weight
    try:
        if linear is not None:
            linear.weight = weight
        else:
            is_head = slot.hf_name == HEAD or before[0] is before[1]
            decoder.embedding = before[0] if slot.hf_name == HEAD else weight
            decoder.head = weight if is_head else before[1]
        yield
    finally:
        decoder.embedding, decoder.head = before
        if linear is not None and own is not None:
            linear.weight = own
