"""A base that no process holds whole: each keeps its share of the bytes of every layer, put together a layer at a time.

The bytes are those that the weights are stored in (blocks of a GGUF, NF4's codes and scales, floats): nothing is ever
dequantized to be dealt out, and a layer that was put together is, bit for bit, the one that was dealt out. torch's
`fully_shard` is not used: it shards parameters of one float type, and keeps order by hooks around modules that every
process must pass equally often. Frozen weights are no parameters, have several tensors each, and are asked for by the
backward pass of their own functions, in a preference step more often on one process than on another.

Here a weight asks for its layer when it is used. If that is not the one that lies in the buffer, all processes meet
and gather it (`Processes.meet_for`). The vocabulary's rows stay whole: each process looks up its own, and multiplies by
as many of them as it has tokens to learn.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from edgelora.base.nf4 import NF4
from edgelora.base.products import Products
from edgelora.base.torch_blocks import DeviceBlocks
from edgelora.base.weights import Dense, GGUFBlocks
from edgelora.errors import ConfigError
from edgelora.nn.decoder import Decoder
from edgelora.nn.linear import Linear, Weight
from edgelora.nn.mixture import Expert, Mixture
from edgelora.training.distributed import Processes, reached

if TYPE_CHECKING:
    from edgelora.base.triton_blocks import Stored

ALIGNED = 64  # bytes: where a tensor may begin in the bytes of its layer


def shard(decoder: Decoder, world: Processes) -> int:
    """Deal out the layers of a decoder that lies, mapped where it can be, in the machine's memory.

    What it needs beside them goes to `world.device`. Returns how many bytes of the layers this process keeps. Raises
    ConfigError for a type that this device has no code for.
    """
    shards = Shards(world, [sum(map(_size, frozen(layer))) for layer in decoder.model.layers])
    for layer in decoder.model.layers:
        replace_frozen(layer, shards.deal(list(frozen(layer))))
    decoder.embedding, decoder.head = decoder.embedding.to(world.device), decoder.head.to(world.device)
    world.hand_out = shards.gather
    return sum(share.nbytes for share in shards.shares)


class Shards:
    """This process's share of every layer, and one buffer in which a layer is put together.

    sizes: the bytes of each layer, as `_size` counts them.
    """

    def __init__(self, world: Processes, sizes: Sequence[int]) -> None:
        self._world = world
        self.shares: list[Tensor] = []  # uint8, of each layer as much as of the next process
        self._buffer = torch.empty(max(map(self._padded, sizes)), dtype=torch.uint8, device=world.device)
        self._there: int | None = None  # the layer in the buffer

    def deal(self, weights: Sequence[Weight]) -> list[Sharded]:
        """Keep this process's share of the next layer, whose weights these are; what takes their place."""
        tensors = [tensor for weight in weights for tensor in stored_bytes(weight)]
        starts = list(itertools.accumulate((_aligned(len(t)) for t in tensors), initial=0))
        n = self._padded(starts[-1]) // self._world.size
        self.shares.append(share_of(tensors, starts, self._world.rank * n, n).to(self._world.device))
        places = iter([self._buffer[start : start + len(t)] for start, t in zip(starts, tensors, strict=False)])
        layer = len(self.shares) - 1
        return [Sharded(self, layer, _over(weight, [next(places) for _ in stored_bytes(weight)])) for weight in weights]

    def bring(self, layer: int) -> None:
        """Have that layer in the buffer."""
        if layer != self._there:
            self._world.meet_for(layer)

    def gather(self, layer: int) -> None:
        """Put that layer together; all processes do so at once."""
        self._there = layer
        share = self.shares[layer]
        with reached():
            dist.all_gather_single(self._buffer[: self._world.size * len(share)], share, group=self._world.data)

    def _padded(self, n_bytes: int) -> int:
        """In as many equal shares, whole numbers of aligned places, as there are processes."""
        return -(-n_bytes // (ALIGNED * self._world.size)) * ALIGNED * self._world.size


class Sharded(Products):
    """A `Weight` in a layer that is dealt out: using it brings the layer, and may overwrite another one's weights."""

    def __init__(self, shards: Shards, layer: int, whole: Weight) -> None:
        self.shape, self.size_bytes = whole.shape, whole.size_bytes
        self._shards, self._layer, self._whole = shards, layer, whole

    def to(self, _device: torch.device | str) -> Sharded:
        return self  # where it is was settled when it was dealt out

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._brought().dequantize(dtype)

    def rows(self, first: int, last: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._brought().rows(first, last, dtype)

    def gather(self, ids: Tensor) -> Tensor:
        return self._brought().gather(ids)

    def for_triton(self) -> Stored | None:
        whole = self._brought()
        return whole.for_triton() if isinstance(whole, Products) else None

    def _brought(self) -> Weight:
        self._shards.bring(self._layer)
        return self._whole


def share_of(tensors: Sequence[np.ndarray], starts: Sequence[int], first: int, n: int) -> Tensor:
    """uint8 (n,): the bytes [first, first + n) of a layer in which each of `tensors` lies at its start.

    Reads nothing else of what is mapped.
    """
    share = torch.zeros(n, dtype=torch.uint8)
    for tensor, start in zip(tensors, starts, strict=False):
        a, b = max(first, start), min(first + n, start + len(tensor))
        if a < b:
            share.numpy()[a - first : b - first] = tensor[a - start : b - start]
    return share


def stored_bytes(weight: Weight) -> list[np.ndarray]:
    """Each tensor of a weight in the machine's memory as its bytes, uint8 (n,), not copied."""
    if isinstance(weight, GGUFBlocks):
        return [np.ascontiguousarray(weight.blocks).reshape(-1)]
    return [tensor.contiguous().view(-1).view(torch.uint8).numpy() for tensor in _tensors(weight)]


def _tensors(weight: Weight) -> list[Tensor]:
    if isinstance(weight, Dense):
        return [weight.values]
    if isinstance(weight, NF4):
        return [weight.codes, weight.scale_codes, weight.scale_of_scales, weight.offset]
    raise ConfigError(
        what=f"--shard-base: weights held as {type(weight).__name__} cannot be dealt out",
        why="there is code for blocks, NF4 and floats in the machine's memory",
        fix="leave --shard-base out, or hold the base another way (--base-dtype)",
    )


def _over(weight: Weight, places: Sequence[Tensor]) -> Weight:
    """A weight like this one whose tensors lie at `places`, uint8 (n,) each."""
    if isinstance(weight, GGUFBlocks):
        rows = places[0].view(weight.blocks.shape)
        if rows.device.type != "cpu":
            return DeviceBlocks(rows, weight.kind, weight.shape[1])
        return GGUFBlocks(rows.numpy(), weight.kind, weight.shape[1])
    there = [p.view(t.dtype).view(t.shape) for p, t in zip(places, _tensors(weight), strict=True)]
    return NF4(weight.shape, *there) if isinstance(weight, NF4) else Dense(*there)


def _size(weight: Weight) -> int:
    return sum(_aligned(len(tensor)) for tensor in stored_bytes(weight))


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNED) * ALIGNED


def frozen(layer: nn.Module) -> Iterator[Weight]:
    """Every matrix of a layer; `replace_frozen` takes others in this order."""
    for module in layer.modules():
        if isinstance(module, Linear):
            yield module.weight
        elif isinstance(module, Mixture):
            yield module.router
            yield from itertools.chain.from_iterable(module.experts)


def replace_frozen(layer: nn.Module, weights: Sequence[Weight]) -> None:
    """Put `weights` in the places of a layer's matrices, in the order of `frozen`."""
    new = iter(weights)
    for module in layer.modules():
        if isinstance(module, Linear):
            module.weight = next(new)
        elif isinstance(module, Mixture):
            module.router = next(new)
            module.experts = [Expert(next(new), next(new), next(new)) for _ in module.experts]
