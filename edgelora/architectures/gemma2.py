"""Gemma 2 (arXiv:2408.00118): norms on both sides of each block, soft-capped scores and logits, every other layer
looking at a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelora.architectures.config import SANDWICH, Architecture, ModelConfig
from edgelora.architectures.reading import (
    every,
    gguf_dimensions,
    gguf_pattern,
    hf_dimensions,
    hf_layer_types,
    number,
    optional_window,
    require_act,
)
from edgelora.files.gguf import GGUFFile

# llama.cpp knows the 27B model by its layers and takes another scale of q·k for it
LAYERS_OF_27B = 46


def read_hf(config: Mapping[str, Any]) -> ModelConfig:
    config = {"head_dim": 256, "tie_word_embeddings": True, **config}
    dims = hf_dimensions(config)
    caps: dict[str, Any] = {key: None if config.get(key, default) is None else number(config, key, default, float)
            for key, default in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0))}  # fmt: skip
    return ModelConfig(
        model_type="gemma2",
        **dims,
        **caps,
        hidden_act=require_act(config, "hidden_activation", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",)),
        attention_multiplier=number(config, "query_pre_attn_scalar", 256, float) ** -0.5,
        embedding_multiplier=dims["hidden_size"] ** 0.5,
        sliding_window=optional_window(config, 4096),
        layer_types=hf_layer_types(config, dims["num_hidden_layers"], every(2, dims["num_hidden_layers"])),
    )


def read_gguf(file: GGUFFile) -> ModelConfig:
    dims = gguf_dimensions(file)
    layers = dims["num_hidden_layers"]
    return ModelConfig(
        model_type="gemma2",
        **dims,
        attn_logit_softcapping=file.get("gemma2.attn_logit_softcapping", float, 50.0),
        final_logit_softcapping=file.get("gemma2.final_logit_softcapping", float, 30.0),
        hidden_act="gelu_pytorch_tanh",
        attention_multiplier=_multiplier_in_llama_cpp(
            layers, dims["hidden_size"], dims["num_attention_heads"], dims["head_dim"]
        ),
        embedding_multiplier=dims["hidden_size"] ** 0.5,
        sliding_window=file.get("gemma2.attention.sliding_window", int, 4096),
        layer_types=gguf_pattern(file, layers, every(2, layers)),
    )


def _multiplier_in_llama_cpp(layers: int, hidden_size: int, heads: int, head_dim: int) -> float:
    return float((hidden_size // heads if layers == LAYERS_OF_27B else head_dim) ** -0.5)


def unlike_llama_cpp(config: ModelConfig) -> str | None:
    c = config
    if c.attn_logit_softcapping is None or c.final_logit_softcapping is None or c.sliding_window is None:
        return "its missing soft cap or window, for which it takes a default"
    if not c.tie_word_embeddings:
        return "its own head, for which it takes the embedding"
    scale = _multiplier_in_llama_cpp(c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.head_dim)
    return None if abs(scale / c.attention_scale - 1) < 1e-6 else "the scale of its attention (query_pre_attn_scalar)"


GEMMA2 = Architecture(
    "gemma2", "gemma2", read_hf, read_gguf, norms=SANDWICH, norm_shift=1.0, window_in_llama_cpp=True,
    states_window=True, unlike_llama_cpp=unlike_llama_cpp,
    more_keys={key: key for key in ("attn_logit_softcapping", "final_logit_softcapping")},
)  # fmt: skip
