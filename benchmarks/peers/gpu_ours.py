"""The side of edgelora on a GPU: QLoRA over random NF4 or Q4_K blocks, by the loop that `edgelora train` runs.

The job is put together as training/run.py does, without a base's files; steps, gradients, optimizer, recomputation and
offload are the product's own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as Type
from torch import Tensor

from edgelora.architectures import ARCHITECTURES, ModelConfig, Rope
from edgelora.architectures.names import EMBEDDING, HEAD, tensor_shapes
from edgelora.base import ggml
from edgelora.base.device_memory import grow_in_place
from edgelora.base.host_rows import HostRows
from edgelora.base.nf4 import quantize_nf4
from edgelora.base.torch_blocks import DeviceBlocks
from edgelora.base.weights import Dense, GGUFBlocks
from edgelora.config import TrainConfig
from edgelora.data.encode import Example
from edgelora.data.order import Order
from edgelora.nn.decoder import Decoder
from edgelora.nn.frozen import Frozen
from edgelora.nn.linear import Weight
from edgelora.peft.inject import inject
from edgelora.progress import Progress
from edgelora.training.interrupt import Interrupt
from edgelora.training.job import Job
from edgelora.training.loop import train
from edgelora.training.objectives import objective_of
from edgelora.training.recorder import Silent
from edgelora.training.state import State
from peers.channel import Turnstile
from peers.gpu import (
    ALPHA,
    DEVIATION,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    RANK,
    SHAPES,
    THETA,
    WARM_UP,
    begun,
    out_of_memory,
    peaks,
)  # fmt: skip

# chat rows: log-normal around 160 tokens, clipped, behind what all templates begin with; the second half is learned
RAGGED_ROWS, AROUND, SPREAD, SHORTEST, LONGEST, SHARED = 1024, 160, 0.6, 50, 500, 24
RAGGED_BATCH = 32  # rows of a step
SEEDED_ROWS = 64  # of random blocks: quantizing billions of weights to Q4_K would take the CPU minutes


def blocks(shape: tuple[int, int], kind: Type, device: str) -> GGUFBlocks | DeviceBlocks:
    """Real blocks of normal weights; the rows of a matrix are drawn from a few."""
    draw = np.random.default_rng(0)
    few = ggml.quantize((draw.normal(0, DEVIATION, (SEEDED_ROWS, shape[1]))).astype(np.float32), kind)
    rows = draw.integers(0, SEEDED_ROWS, shape[0])
    if device == "cpu":
        return GGUFBlocks(few[rows], kind, shape[1])
    return DeviceBlocks(torch.from_numpy(few).to(device)[torch.from_numpy(rows).to(device)], kind, shape[1])


def dense(shape: tuple[int, int], device: str) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device).mul_(DEVIATION)


def matrix(name: str, shape: tuple[int, int], held: str, device: str) -> Weight:
    """As in a Q4_K_M file the head is Q6_K; beside NF4 it is what a checkpoint has, bf16."""
    if held == "q4_k":
        return blocks(shape, Type.Q6_K if name.startswith(HEAD) else Type.Q4_K, device)
    return Dense(dense(shape, device)) if name.startswith(HEAD) else quantize_nf4(dense(shape, device))


def vocabulary(shape: tuple[int, int], held: str, device: str) -> HostRows:
    """Beside the head, it stays with the machine."""
    kept = blocks(shape, Type.Q4_K, "cpu") if held == "q4_k" else Dense(dense(shape, device).cpu())
    assert not isinstance(kept, DeviceBlocks)
    return HostRows(kept)


def build(settings: dict[str, Any]) -> Decoder:
    """The decoder without an adapter; products in bfloat16. Its embedding stays with the machine, as in a run."""
    shape, held, device = (settings[name] for name in ("shape", "held", "device"))
    config = ModelConfig(model_type="llama", rope=Rope(THETA, SHAPES[shape]["head_dim"]), **SHAPES[shape])
    architecture = ARCHITECTURES["llama"]
    matrices: dict[str, Weight] = {}
    vectors: dict[str, Tensor] = {}
    for name, size in tensor_shapes(architecture, config).items():
        if len(size) == 1:
            vectors[name] = torch.ones(size)
        elif name.startswith(EMBEDDING):
            embedding = vocabulary((size[0], size[1]), held, device)
        else:
            matrices[name.removesuffix(".weight")] = matrix(name, (size[0], size[1]), held, device)
    frozen = Frozen(matrices, vectors, embedding, matrices.pop(HEAD), torch.bfloat16)
    decoder = Decoder(architecture, config, frozen)
    decoder.recompute, decoder.offload = settings["recompute"], settings["offload"]
    return decoder


class Step(Silent):
    """Told by the training loop that a step is over: it goes on when the benchmark wants another."""

    def __init__(self, turn: Turnstile, device: str, warm_up: int = WARM_UP) -> None:
        super().__init__(Interrupt())
        self.turn, self.losses, self.warm_up = turn, list[float](), warm_up
        turn.handlers = {"peaks": lambda _: peaks(device)}

    def stepped(self, progress: Progress, tokens: int, seconds: float) -> None:  # noqa: ARG002
        assert progress.loss is not None
        if len(self.losses) >= self.warm_up:
            self.turn.end(tokens=tokens)
        self.losses.append(progress.loss)
        if len(self.losses) == self.warm_up:
            self.turn.facts["losses"] = self.losses[:WARM_UP]
        if len(self.losses) >= self.warm_up:
            self.turn.begin()


def ragged(vocabulary: int) -> list[Example]:
    """Rows as chats are: of many lengths, and all begun alike."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(np.log(AROUND), SPREAD, RAGGED_ROWS), SHORTEST, LONGEST).astype(int)
    shared = draw.integers(vocabulary, size=SHARED)
    rows = (np.concatenate([shared, draw.integers(vocabulary, size=n)]) for n in lengths)
    return [Example(row, np.arange(len(row)) > len(row) // 2) for row in rows]


def prepared(settings: dict[str, Any], row: Tensor) -> tuple[Job, State, dict[str, Any]]:
    """What `edgelora train` hands to its loop, over one row of tokens, all but the first of which are learned; or over
    `ragged` ones, packed into micro-batches of as many tokens."""
    device, tokens, is_ragged = settings["device"], len(row), settings.get("ragged", False)
    config = TrainConfig(
        base=Path("none"), data=Path("none"), out=Path("none"), rank=RANK, alpha=ALPHA, learning_rate=LEARNING_RATE,
        max_grad_norm=MAX_GRAD_NORM, optimizer=settings["optimizer"], offload=settings["offload"], schedule="constant",
        warmup_steps=0, batch_rows=RAGGED_BATCH if is_ragged else 1,
        micro_batch_tokens=tokens, max_length=tokens, epochs=10_000, device=device, dtype="bf16",
        eval_every=1_000_000,
    )  # fmt: skip
    decoder = build(settings)
    inject(decoder, config.method, RANK, ALPHA, config.seed)
    decoder.to(device)
    if settings["graphs"]:
        decoder.record_passes(tokens)
    rows = [Example(row.numpy(), np.arange(tokens) > 0)]
    if is_ragged:
        rows = ragged(SHAPES[settings["shape"]]["vocab_size"])
    job = Job(decoder, objective_of(config), rows, Order([len(rows)], config.batch_rows, config.seed), config)
    weights = [*(linear.weight for linear in decoder.linears.values()), decoder.head]
    facts = {"frozen_bytes": sum(weight.size_bytes for weight in weights)}
    state = State(decoder.named_parameters(), config)
    return job, state, {**facts, "parameters": sum(p.numel() for p in state.parameters.values())}


def main(settings: dict[str, Any]) -> None:
    grow_in_place(settings["device"])
    turn, row = Turnstile(), begun(settings)
    try:
        job, state, turn.facts = prepared(settings, row)
        train(job, state, Step(turn, settings["device"], settings.get("warm_up", WARM_UP)))
    except torch.OutOfMemoryError as e:
        out_of_memory(turn, e)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
