"""Final hidden states with one layer of a model in memory at a time: all rows go through it, then its pages go.

What `Decoder.forward` computes, of models larger than the memory there is. No gradients, and no logits: `base/head.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from edgelora.architectures.names import EMBEDDING, FINAL_NORM, tensor_shapes
from edgelora.base.decoder import held
from edgelora.base.hold import hold
from edgelora.base.model import Base
from edgelora.data.pack import Batch
from edgelora.nn.decoder import Frozen, Layer, Norm, Tables
from edgelora.nn.linear import Linear
from edgelora.nn.primitives import bound_primitives
from edgelora.nn.rotary import rotary_tables
from edgelora.peft.adapter import Adapter
from edgelora.peft.blend import blend_linears


@torch.no_grad()
def hidden_states(
    base: Base,
    batches: Sequence[Batch],
    adapters: Sequence[tuple[Adapter, float]] = (),
    on_layer: Callable[[], None] = lambda: None,
) -> list[np.ndarray]:
    """Of each packed row float32 (T, d), with the adapters at their scales: what `Decoder.forward` gives for it."""
    bound_primitives()
    config = base.config
    states = _embedded(base, batches)
    tables = [_tables(base, batch) for batch in batches]
    for i in range(config.num_hidden_layers):
        layer = _layer(base, i, adapters)
        states = [
            layer(x, table, list(batch.segment_starts), batch.prefix)
            for x, table, batch in zip(states, tables, batches, strict=True)
        ]
        for name in _names(base, i):
            base.tensors.forget(name)
        on_layer()
    norm = Norm(torch.from_numpy(base.tensors.vector(f"{FINAL_NORM}.weight").copy()), config.rms_norm_eps)
    return [(norm(x) / config.logits_scaling).numpy() for x in states]


def _embedded(base: Base, batches: Sequence[Batch]) -> list[Tensor]:
    name = f"{EMBEDDING}.weight"
    embedding = hold(base.tensors.matrix(name), "blocks")
    states = [
        embedding.gather(torch.from_numpy(batch.input_ids)) * base.config.embedding_multiplier for batch in batches
    ]
    base.tensors.forget(name)
    return states


def _tables(base: Base, batch: Batch) -> Tables:
    config, positions = base.config, torch.from_numpy(batch.positions)
    ropes = {rope for i in range(config.num_hidden_layers) if (rope := config.rope_of(i)) is not None}
    return {rope: rotary_tables(positions, rope, batch.segment_starts, batch.prefix) for rope in ropes}


def _layer(base: Base, number: int, adapters: Sequence[tuple[Adapter, float]]) -> Layer:
    matrices, vectors = held(base, _names(base, number))
    unused = next(iter(matrices.values()))  # a layer has neither an embedding nor a head
    layer = Layer(base.architecture, base.config, Frozen(matrices, vectors, unused, unused), number)
    prefix = f"model.layers.{number}"
    linears = {f"{prefix}.{name}": module for name, module in layer.named_modules() if isinstance(module, Linear)}
    blend_linears(linears, adapters)
    return layer


def _names(base: Base, layer: int) -> list[str]:
    prefix = f"model.layers.{layer}."
    return [name for name in tensor_shapes(base.architecture, base.config, base.biased) if name.startswith(prefix)]
