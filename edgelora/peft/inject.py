"""Put an adapter on a built decoder, and take it off again: `inject` → train → `collect`, or `attach` a trained one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from edgelora.nn.decoder import Decoder
from edgelora.peft.adapter import Adapter
from edgelora.peft.lora import LoraDelta
from edgelora.peft.methods import METHODS


def inject(decoder: Decoder, method: str, rank: int, alpha: float, seed: int) -> list[torch.nn.Parameter]:
    """Give every linear layer a fresh delta; returns the parameters to train. Deterministic under `seed`."""
    generator = torch.Generator().manual_seed(seed)
    for linear in decoder.linears.values():
        linear.delta = METHODS[method].fresh(linear.weight.shape, rank, alpha, generator)
    return list(decoder.parameters())


def collect(decoder: Decoder) -> dict[str, dict[str, np.ndarray]]:
    """The trained tensors of every linear layer, as numpy."""
    return {
        name: {part: tensor.numpy().copy() for part, tensor in linear.delta.tensors().items()}
        for name, linear in decoder.linears.items()
        if linear.delta is not None
    }


def attach(decoder: Decoder, adapter: Adapter | None) -> None:
    """Make `adapter` what the decoder computes, in place of whatever was on it. None takes it off."""
    pairs = adapter.pairs() if adapter else {}
    for name, linear in decoder.linears.items():
        pair = pairs.get(name)
        linear.delta = None if pair is None else LoraDelta(torch.from_numpy(pair.a), torch.from_numpy(pair.b), 1.0)


@contextmanager
def without_adapter(decoder: Decoder) -> Iterator[None]:
    """In here every linear layer is the frozen one: the reference of a preference loss needs no second model."""
    linears = list(decoder.linears.values())
    deltas = [linear.delta for linear in linears]
    try:
        for linear in linears:
            linear.delta = None
        yield
    finally:
        for linear, delta in zip(linears, deltas, strict=True):
            linear.delta = delta
