"""Qwen2 and Qwen2.5 (arXiv:2412.15115): biases on q, k and v; windows in the upper layers if switched on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelora.architectures.config import Architecture, LlamaCpp, ModelConfig
from edgelora.architectures.reading import gguf_dimensions, hf_dimensions, require_act, upper_window
from edgelora.files.gguf import GGUFFile


def read_hf(config: Mapping[str, Any]) -> ModelConfig:
    """transformers' default of 32 key-value heads; a window in upper layers, if `use_sliding_window` is on."""
    require_act(config, "hidden_act", "silu")
    dims = hf_dimensions({"num_key_value_heads": 32, **config})
    return ModelConfig(model_type="qwen2", **dims, **upper_window(config, dims["num_hidden_layers"]))


def read_gguf(file: GGUFFile) -> ModelConfig:
    """llama.cpp knows no window of this family: whoever converted the model has left it out."""
    return ModelConfig(model_type="qwen2", **gguf_dimensions(file))


QWEN2 = Architecture(
    model_type="qwen2",
    gguf_name="qwen2",
    read_hf=read_hf,
    read_gguf=read_gguf,
    llama_cpp=LlamaCpp(whole_heads=True),
)
