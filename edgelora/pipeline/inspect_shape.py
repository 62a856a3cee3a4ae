"""What takes a base's place on disk, and which model it is: the weights, their types, dimensions and positions.

Of one that cannot be opened it is what its metadata says, whether it can be or not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converters.base_to_gguf import shortened_context
from edgelora.base.model import FLOAT_QUANTS, Base
from edgelora.files.checkpoint import Checkpoint
from edgelora.files.gguf import GGUFFile
from edgelora.pipeline.inspect_facts import TypeShare, shares, stated

Source = GGUFFile | Checkpoint

# What is shown of a model's shape, by its name in config.json → its key in a GGUF, behind the architecture.
DIMENSIONS = {
    "num_hidden_layers": "block_count", "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length", "vocab_size": "vocab_size", "max_position_embeddings": "context_length",
    "sliding_window": "attention.sliding_window", "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count", "moe_intermediate_size": "expert_feed_forward_length",
}  # fmt: skip
# Rope frequencies stand among the tensors, but are no weights.
TABLES = re.compile(r"rope_(freqs|factors_\w+)\.weight|.*rotary_emb\.inv_freq")
# The quantizations with blocks of 256.
WIDE = re.compile(r"Q\d_K|TQ|IQ(?!4_NL)")


@dataclass(frozen=True)
class Weights:
    """What the weights of a base take, and how they are stored."""

    size_bytes: int
    files: int
    quant: str
    types: list[TypeShare]
    parameters: int | None
    """None where integers hold the weights of a checkpoint in a way that is not known."""
    bits_per_weight: float | None


@dataclass(frozen=True)
class Shape:
    """Which model a base is: its family, dimensions and positions."""

    model_type: str | None
    """As in config.json; None for the GGUF of a family that is not known."""
    gguf_architecture: str | None
    dimensions: dict[str, int]
    """By their names in config.json; what does not apply is left out."""
    rope: dict[str, Any]
    sliding_layers: int = 0
    """How many layers look at the sliding window only."""
    context_in_llama_cpp: int | None = None
    context_reason: str | None = None
    """Why llama.cpp may see less than `max_position_embeddings`."""


def weights_of(source: Source, base: Base | None) -> Weights:
    """Of a base that can be opened, or of what stands there instead."""
    if isinstance(source, GGUFFile):
        tensors = [(t.name, t.type.name, t.shape, t.size_bytes) for t in source.tensors.values()]
        known = True
    else:
        tensors = [(t.name, t.dtype, t.shape, t.size_bytes) for t in source.tensors.values()]
        known = {kind for _, kind, _, _ in tensors} <= set(FLOAT_QUANTS)
    tied_copy = "lm_head.weight" if base is not None and base.config.tie_word_embeddings else None
    tensors = [t for t in tensors if t[0] != tied_copy and not TABLES.fullmatch(t[0])]
    wide = base is not None and WIDE.match(base.quant) is not None
    types = shares((t[1:] for t in tensors), wide=wide)
    parameters, size = sum(t.parameters for t in types), sum(t.size_bytes for t in types)
    return Weights(
        size_bytes=source.size_bytes,
        files=1 if isinstance(source, GGUFFile) else len(source.shards),
        quant=base.quant if base else max(types, key=lambda t: t.parameters).type if types else "no weights",
        types=types,
        parameters=parameters if known else None,
        bits_per_weight=8 * size / parameters if known and parameters else None,
    )


def shape_of(source: Source, base: Base | None) -> Shape:
    """Of a base that can be opened, or of what stands there instead."""
    return _stated_shape(source) if base is None else _opened_shape(base)


def _opened_shape(base: Base) -> Shape:
    config, rope = base.config, base.config.rope
    found = {name: getattr(config, name) for name in DIMENSIONS}
    turns: dict[str, Any] = {"theta": rope.theta, "dim": rope.dim}
    if config.rope_local is not None:
        turns["local_theta"] = config.rope_local.theta
    if rope.scaling != "default":
        turns["scaling"] = rope.scaling
    if rope.factor != 1:
        turns["factor"] = rope.factor
    if rope.original_max_position_embeddings:
        turns["original_max_position_embeddings"] = rope.original_max_position_embeddings
    layers = range(config.num_hidden_layers)
    why = None
    if shortened_context(base) is not None:
        windowed = base.context == config.sliding_window
        why = "it looks beyond the sliding window" if windowed else "in a longer one it takes LongRoPE's long factors"
    return Shape(
        model_type=config.model_type,
        gguf_architecture=base.architecture.gguf_name,
        dimensions={name: value for name, value in found.items() if value},
        rope=turns,
        sliding_layers=sum(config.window(layer) is not None for layer in layers),
        context_in_llama_cpp=base.context,
        context_reason=why,
    )


def _stated_shape(source: Source) -> Shape:
    """What the metadata says, whether it can be or not."""
    if isinstance(source, GGUFFile):
        found = {name: stated(source, f"{source.architecture}.{key}", int) for name, key in DIMENSIONS.items()}
        turns = {"theta": stated(source, f"{source.architecture}.rope.freq_base", float)}
        return Shape(None, source.architecture or None, _given(found), _given(turns))
    config: Mapping[str, Any] = source.config
    inner = config.get("text_config")
    config = {**inner, **config} if isinstance(inner, dict) else config
    numbers = {name: config[name] for name in DIMENSIONS if type(config.get(name)) is int}
    theta = config.get("rope_theta")
    kind = config.get("model_type")
    return Shape(str(kind) if kind else None, None, numbers, {"theta": theta} if type(theta) in (int, float) else {})


def _given(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if value is not None}
