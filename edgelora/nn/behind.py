"""The decoder behind a soft prompt or a prefix: what it computes of a row that something precedes which is no token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from edgelora.nn.attention import SegmentAttention
from edgelora.nn.cache import KeyValues
from edgelora.nn.decoder import Attention, Decoder
from edgelora.nn.scores import Scores


class _Past(KeyValues):
    """Keys (n, KV, d), as they are read, and values that every row of one segment finds before it."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self._past = keys, values

    def attend(self, q: Tensor, k: Tensor, v: Tensor, starts: list[int], prefix: int, how: Scores) -> Tensor:
        assert starts == [0, len(q)]
        keys, values = self._past
        n = len(keys)
        # queries of the past too, whose answers nobody reads: a segment has as many of each
        q, k, v = torch.cat([q.new_zeros(n, *q.shape[1:]), q]), torch.cat([keys, k]), torch.cat([values, v])
        out: Tensor = SegmentAttention.apply(q, k, v, [0, len(q)], prefix, how)
        return out[n:]


@torch.no_grad()
def hidden_behind_embeddings(decoder: Decoder, embeddings: Tensor, ids: Tensor) -> Tensor:
    """Final hidden states float32 (T, d) of ids (T,) behind embeddings (n, d), which go into the first layer."""
    n = len(embeddings)
    total = n + len(ids)
    noise = decoder.noise
    try:
        decoder.noise = lambda x, _: torch.cat([embeddings, x[n:]])
        return decoder(torch.cat([ids.new_zeros(n), ids]), torch.arange(total), [0, total])[n:]
    finally:
        decoder.noise = noise


@torch.no_grad()
def hidden_behind_past(decoder: Decoder, keys: Sequence[Tensor], values: Sequence[Tensor], ids: Tensor) -> Tensor:
    """The same behind keys and values (n, KV, d) of each layer: ids are at the positions n, n + 1 …"""
    n = len(keys[0])
    with _past(decoder, keys, values):
        hidden: Tensor = decoder(ids, torch.arange(n, n + len(ids)), [0, len(ids)])
        return hidden


@contextmanager
def _past(decoder: Decoder, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    layers = [module for module in decoder.modules() if isinstance(module, Attention)]
    try:
        for layer, k, v in zip(layers, keys, values, strict=True):
            layer.cache = _Past(k, v)
        yield
    finally:
        for layer in layers:
            layer.cache = None
