"""Final hidden states with one layer of a model in memory at a time: all rows go through it, then its pages go.

What `Decoder.forward` computes, of models larger than the memory there is. No gradients, and no logits: `base/head.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from edgelora.architectures.names import EMBEDDING, FINAL_NORM, tensor_shapes
from edgelora.base.decoder import held
from edgelora.base.hold import hold
from edgelora.base.model import Base
from edgelora.data.pack import Batch
from edgelora.nn.awake import Awake
from edgelora.nn.decoder import Adaptable, adaptable, final_norm
from edgelora.nn.frozen import Frozen
from edgelora.nn.layer import Layer
from edgelora.nn.primitives import bound_primitives
from edgelora.nn.rotary import tables_of
from edgelora.nn.vocabulary import Vocabulary

Adapt: TypeAlias = Callable[[Mapping[str, Adaptable]], None]
"""Puts adapters on some linear layers and norms, by their full HF names."""


@torch.no_grad()
def hidden_states(
    base: Base,
    batches: Sequence[Batch],
    adapt: Adapt = lambda _: None,
    on_layer: Callable[[], None] = lambda: None,
    awake: Awake | None = None,
) -> list[np.ndarray]:
    """Of each packed row float32 (T, d), what `Decoder.forward` gives; `adapt` sees each layer before it runs, and
    `awake`, where an aLoRA is among the adapters, each row before a layer does."""
    bound_primitives()
    config = base.config
    states = _embedded(base, batches, adapt)
    tables = [tables_of(config, torch.from_numpy(b.positions), b.segment_starts, b.prefix) for b in batches]
    for i in range(config.num_hidden_layers):
        layer = _layer(base, i, adapt)
        for row, (table, batch) in enumerate(zip(tables, batches, strict=True)):
            if awake is not None:
                ids, positions = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.positions)
                awake.see(ids, positions, batch.segment_starts, batch.prefix)
            states[row] = layer(states[row], table, list(batch.segment_starts), batch.prefix)
        for name in _names(base, i):
            base.tensors.forget(name)
        on_layer()
    weight = torch.from_numpy(base.tensors.vector(f"{FINAL_NORM}.weight").copy())
    norm = final_norm(base.architecture, config, weight)
    adapt({FINAL_NORM: norm})
    return [(norm(x) / config.logits_scaling).numpy() for x in states]


def _embedded(base: Base, batches: Sequence[Batch], adapt: Adapt) -> list[Tensor]:
    name = f"{EMBEDDING}.weight"
    embedding = Vocabulary(hold(base.tensors.matrix(name), "blocks"))
    adapt({EMBEDDING: embedding})
    states: list[Tensor] = [
        embedding(torch.from_numpy(batch.input_ids)) * base.config.embedding_multiplier for batch in batches
    ]
    base.tensors.forget(name)
    return states


def _layer(base: Base, number: int, adapt: Adapt) -> Layer:
    matrices, vectors = held(base, _names(base, number))
    unused = next(iter(matrices.values()))  # a layer has neither an embedding nor a head
    layer = Layer(base.architecture, base.config, Frozen(matrices, vectors, unused, unused), number)
    adapt(adaptable(layer, f"model.layers.{number}"))
    return layer


def _names(base: Base, layer: int) -> list[str]:
    prefix = f"model.layers.{layer}."
    return [name for name in tensor_shapes(base.architecture, base.config, base.biased) if name.startswith(prefix)]
