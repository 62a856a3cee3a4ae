"""Make the fingerprint of a base from its weights: the same from a file at any quantization. Imports no torch."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgelora.architectures import Architecture, ModelConfig
from edgelora.architectures.names import gguf_place, is_norm, tensor_shapes
from edgelora.base.tensors import Tensors
from edgelora.files.contract import Fingerprint

ROWS_PER_LAYER = 64

# What a GGUF and a checkpoint say alike. Contexts, windows and a tied head may be stated otherwise by a derived file.
DIMENSIONS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size",
)  # fmt: skip
MIXTURE = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")


def fingerprint(
    tensors: Tensors, architecture: Architecture, config: ModelConfig, tokens: Sequence[str], lineage: tuple[str, ...]
) -> Fingerprint:
    """Reads 64 rows of each layer and all norms; dequantizes nothing else."""
    vocabulary = hashlib.sha256()
    for token in tokens:
        vocabulary.update(token.encode() + b"\0")
    norms = hashlib.sha256()
    names = [name for name in tensor_shapes(architecture, config) if is_norm(name)]
    for name in sorted(names, key=lambda n: gguf_place(architecture, config, n).name):
        norms.update(np.ascontiguousarray(tensors.vector(name), np.float32).tobytes())
    return Fingerprint(
        config=_stated(architecture, config),
        vocabulary_sha256=vocabulary.hexdigest(),
        norms_sha256=norms.hexdigest(),
        sketch=base64.b64encode(_row_norms(tensors, architecture, config).astype(np.float16).tobytes()).decode(),
        lineage=lineage,
    )


def _stated(architecture: Architecture, config: ModelConfig) -> dict[str, Any]:
    """The family by llama.cpp's name (it calls Mistral a llama) and its dimensions; floats as GGUF keeps them."""
    fields = DIMENSIONS + (MIXTURE if config.num_experts else ())
    return {
        "model_type": architecture.gguf_name,
        **{field: getattr(config, field) for field in fields},
        "rms_norm_eps": float(np.float32(config.rms_norm_eps)),
        "rope_theta": float(np.float32(config.rope.theta)),
    }


def _row_norms(tensors: Tensors, architecture: Architecture, config: ModelConfig) -> np.ndarray:
    """Norms of ROWS_PER_LAYER rows of each layer, drawn with a fixed seed over its matrices, in HF's row order."""
    draw = np.random.default_rng(0)
    norms: list[float] = []
    shapes = list((architecture.layer_matrices(config) | architecture.expert_matrices(config)).items())
    for layer in range(config.num_hidden_layers):
        # a mixture has more matrices than rows are drawn: each layer goes on where the last one stopped
        first = layer * ROWS_PER_LAYER if len(shapes) > ROWS_PER_LAYER else 0
        for pick in range(first, first + ROWS_PER_LAYER):
            name, (d_out, _) = shapes[pick % len(shapes)]
            row = int(draw.integers(d_out))
            norms.append(float(np.linalg.norm(tensors.row(f"model.layers.{layer}.{name}.weight", row).floats())))
        for name, _ in shapes:  # with each row the system maps others around it
            tensors.forget(f"model.layers.{layer}.{name}.weight")
    return np.array(norms, np.float32)
