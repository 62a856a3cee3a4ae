"""The side of edgelora on a GPU: QLoRA over random NF4 or Q4_K blocks, through its own decoder, adapter and loss."""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as Type
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from edgelora.architectures import ARCHITECTURES, ModelConfig, Rope
from edgelora.architectures.names import EMBEDDING, HEAD, tensor_shapes
from edgelora.base import ggml
from edgelora.base.nf4 import quantize_nf4
from edgelora.base.torch_blocks import DeviceBlocks
from edgelora.base.weights import Dense
from edgelora.nn.decoder import Decoder, Frozen
from edgelora.nn.linear import Weight
from edgelora.peft.inject import inject
from peers.gpu import ALPHA, DEVIATION, RANK, SHAPES, THETA, Built, serve

SEEDED_ROWS = 64  # of random blocks: quantizing billions of weights to Q4_K would take the CPU minutes


def blocks(shape: tuple[int, int], kind: Type, device: str) -> DeviceBlocks:
    """Real blocks of normal weights; the rows of a matrix are drawn from a few."""
    draw = np.random.default_rng(0)
    few = ggml.quantize((draw.normal(0, DEVIATION, (SEEDED_ROWS, shape[1]))).astype(np.float32), kind)
    rows = torch.from_numpy(draw.integers(0, SEEDED_ROWS, shape[0])).to(device)
    return DeviceBlocks(torch.from_numpy(few).to(device)[rows], kind, shape[1])


def dense(shape: tuple[int, int], device: str) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device).mul_(DEVIATION)


def matrix(name: str, shape: tuple[int, int], held: str, device: str) -> Weight:
    """As in a Q4_K_M file the embedding is Q4_K and the head Q6_K; beside NF4 both are what a checkpoint has, bf16."""
    if held == "q4_k":
        return blocks(shape, Type.Q6_K if name.startswith(HEAD) else Type.Q4_K, device)
    if name.startswith((EMBEDDING, HEAD)):
        return Dense(dense(shape, device))
    return quantize_nf4(dense(shape, device))


def build(shape: str, held: str, device: str) -> Decoder:
    """The decoder with a fresh LoRA, and nothing else, on `device`; products in bfloat16."""
    config = ModelConfig(model_type="llama", rope=Rope(THETA, SHAPES[shape]["head_dim"]), **SHAPES[shape])
    architecture = ARCHITECTURES["llama"]
    matrices: dict[str, Weight] = {}
    vectors: dict[str, Tensor] = {}
    for name, size in tensor_shapes(architecture, config).items():
        if len(size) == 1:
            vectors[name] = torch.ones(size)
        else:
            matrices[name.removesuffix(".weight")] = matrix(name, (size[0], size[1]), held, device)
    embedding, head = matrices.pop(EMBEDDING), matrices.pop(HEAD)
    decoder = Decoder(architecture, config, Frozen(matrices, vectors, embedding, head, torch.bfloat16))
    inject(decoder, "lora", RANK, ALPHA, seed=0)
    recompute(decoder)
    return decoder.to(device)


def recompute(decoder: Decoder) -> None:
    """Every layer keeps its input alone and runs again in the backward pass."""
    layers = list(decoder.model.layers)
    # torch recomputes only what has an input with a gradient
    layers[0].register_forward_pre_hook(lambda _, args: (args[0].requires_grad_(), *args[1:]))
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=True)


def prepared(settings: dict[str, Any], row: Tensor) -> Built:
    decoder = build(settings["shape"], settings["held"], settings["device"])
    positions = torch.arange(len(row), device=row.device)

    def loss() -> Tensor:
        hidden = decoder(row, positions, [0, len(row)])
        return decoder.nll(hidden[:-1], row[1:]).mean()

    weights = [*(linear.weight for linear in decoder.linears.values()), decoder.embedding, decoder.head]
    return list(decoder.parameters()), loss, {"frozen_bytes": sum(weight.size_bytes for weight in weights)}


if __name__ == "__main__":
    serve(prepared, json.loads(sys.argv[1]))
