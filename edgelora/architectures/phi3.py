"""Phi-3 and Phi-4 (arXiv:2404.14219): q, k and v in one matrix, gate and up in another; LongRoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelora.architectures.config import Architecture, LlamaCpp, ModelConfig
from edgelora.architectures.reading import gguf_dimensions, hf_dimensions, optional_window, require_act
from edgelora.files.gguf import GGUFFile


def read_hf(config: Mapping[str, Any]) -> ModelConfig:
    """A window of null is none; q, k, v and gate, up are stored as one matrix each."""
    require_act(config, "hidden_act", "silu")
    return ModelConfig(model_type="phi3", **hf_dimensions(config), sliding_window=optional_window(config))


def read_gguf(file: GGUFFile) -> ModelConfig:
    """A stated window of 0 is none."""
    window = file.get("phi3.attention.sliding_window", int, 0)  # zero in Phi-4's, which has none
    return ModelConfig(model_type="phi3", **gguf_dimensions(file), sliding_window=window or None)


PHI3 = Architecture(
    model_type="phi3",
    gguf_name="phi3",
    read_hf=read_hf,
    read_gguf=read_gguf,
    fused=True,
    llama_cpp=LlamaCpp(
        states_window=True, states_no_window=True, rotates_partly=True, reads_rope_factors=True, whole_heads=True
    ),
)
