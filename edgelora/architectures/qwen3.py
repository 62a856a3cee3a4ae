"""Qwen3 (arXiv:2505.09388): a norm over each head of q and k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelora.architectures.config import ATTENTION_BIAS, Architecture, ModelConfig
from edgelora.architectures.reading import gguf_dimensions, hf_dimensions, require_act, upper_window
from edgelora.files.gguf import GGUFFile


def read_hf(config: Mapping[str, Any]) -> ModelConfig:
    """transformers' defaults: 32 key-value heads of 128; a window only where `use_sliding_window` says so."""
    require_act(config, "hidden_act", "silu")
    dims = hf_dimensions({"num_key_value_heads": 32, "head_dim": 128, **config})
    return ModelConfig(model_type="qwen3", **dims, **upper_window(config, dims["num_hidden_layers"]))


def read_gguf(file: GGUFFile) -> ModelConfig:
    """llama.cpp knows no window of this family: whoever converted the model has left it out."""
    return ModelConfig(model_type="qwen3", **gguf_dimensions(file))


QWEN3 = Architecture(
    model_type="qwen3",
    gguf_name="qwen3",
    read_hf=read_hf,
    read_gguf=read_gguf,
    qk_norm="head",
    bias_settings=ATTENTION_BIAS,
)
