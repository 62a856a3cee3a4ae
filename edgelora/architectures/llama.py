"""Llama 2 and 3.x, SmolLM2, TinyLlama and every model that calls itself LlamaForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelora.architectures.config import ATTENTION_BIAS, MLP_BIAS, QKV, Architecture, LlamaCpp, ModelConfig
from edgelora.architectures.reading import gguf_dimensions, hf_dimensions, require_act
from edgelora.files.gguf import GGUFFile


def read_hf(config: Mapping[str, Any]) -> ModelConfig:
    """A Llama's config.json says no window, whatever stands in it."""
    require_act(config, "hidden_act", "silu")
    return ModelConfig(model_type="llama", **hf_dimensions(config))


def read_gguf(file: GGUFFile) -> ModelConfig:
    """A window where an older file of a Mistral, which is a llama there, states one."""
    window = file.get("llama.attention.sliding_window", int, 0)  # in older files of Mistral; llama.cpp ignores it
    return ModelConfig(model_type="llama", **gguf_dimensions(file), sliding_window=window or None)


LLAMA = Architecture(
    model_type="llama",
    gguf_name="llama",
    read_hf=read_hf,
    read_gguf=read_gguf,
    pairs_rotary_rows=True,
    bias_settings=ATTENTION_BIAS | MLP_BIAS,
    llama_cpp=LlamaCpp(
        reads_rope_factors=True, biases=(*QKV, "self_attn.o_proj", *MLP_BIAS["mlp_bias"]), states_window=True
    ),
)
