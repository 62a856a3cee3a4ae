"""Mixtral (arXiv:2401.04088): Mistral with a mixture of experts for its MLP. In GGUF a llama with an expert count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgelora.architectures.config import Experts, ModelConfig
from edgelora.architectures.llama import LLAMA
from edgelora.architectures.reading import (
    gguf_dimensions,
    gguf_experts,
    hf_dimensions,
    hf_experts,
    optional_window,
    require_act,
)
from edgelora.files.gguf import GGUFFile


def read_hf(config: Mapping[str, Any]) -> ModelConfig:
    """`intermediate_size` is the width of an expert: this family has no other MLP."""
    require_act(config, "hidden_act", "silu")
    config = {"num_key_value_heads": 8, **config}
    return ModelConfig(
        model_type="mixtral",
        **hf_dimensions(config, theta=1e6),
        **hf_experts(config, "num_local_experts", width="intermediate_size"),
        sliding_window=optional_window(config),
    )


def read_gguf(file: GGUFFile) -> ModelConfig:
    """llama.cpp has it as a llama with experts, whose width is `feed_forward_length`."""
    window = file.get("llama.attention.sliding_window", int, 0)
    experts = gguf_experts(file, width="feed_forward_length")
    return ModelConfig(model_type="mixtral", **gguf_dimensions(file), **experts, sliding_window=window or None)


MIXTRAL = replace(
    LLAMA,
    model_type="mixtral",
    read_hf=read_hf,
    read_gguf=read_gguf,
    bias_settings={},
    experts=Experts("block_sparse_moe.gate", "block_sparse_moe.experts", gate="w1", up="w3", down="w2"),
)
