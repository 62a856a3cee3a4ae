"""Qwen3 with a mixture of experts in every layer (Qwen3-30B-A3B and its kin)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelora.architectures.config import ATTENTION_BIAS, Architecture, Experts, LlamaCpp, ModelConfig
from edgelora.architectures.reading import (
    gguf_dimensions,
    gguf_experts,
    hf_dimensions,
    hf_experts,
    require_act,
    upper_window,
)
from edgelora.errors import BaseModelError
from edgelora.files.gguf import GGUFFile


def read_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Raises BaseModelError if some layers have no experts, which llama.cpp cannot run."""
    require_act(config, "hidden_act", "silu")
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise BaseModelError(
            what="config.json: some layers have no experts (decoder_sparse_step, mlp_only_layers)",
            why="llama.cpp runs this family with experts in every layer only",
            fix="use another base",
        )
    dims = hf_dimensions({"num_key_value_heads": 4, **config})
    count = "num_experts" if "num_experts" in config else "num_local_experts"
    return ModelConfig(
        model_type="qwen3_moe",
        **dims,
        **hf_experts(config, count, width="moe_intermediate_size"),
        norm_topk_prob=config.get("norm_topk_prob", False) is True,
        **upper_window(config, dims["num_hidden_layers"]),
    )


def read_gguf(file: GGUFFile) -> ModelConfig:
    """Experts in every layer, their chosen weights made to sum to one: llama.cpp knows no other."""
    return ModelConfig(
        model_type="qwen3_moe", **gguf_dimensions(file), **gguf_experts(file, width="expert_feed_forward_length")
    )


def otherwise_in_llama_cpp(config: ModelConfig) -> str | None:
    """What llama.cpp would compute otherwise than this config says, or None."""
    return None if config.norm_topk_prob else "the weights of the chosen experts, which it makes sum to one"


QWEN3_MOE = Architecture(
    model_type="qwen3_moe",
    gguf_name="qwen3moe",
    read_hf=read_hf,
    read_gguf=read_gguf,
    qk_norm="head",
    bias_settings=ATTENTION_BIAS,
    experts=Experts("mlp.gate", "mlp.experts", gate="gate_proj", up="up_proj", down="down_proj"),
    llama_cpp=LlamaCpp(otherwise=otherwise_in_llama_cpp),
)
