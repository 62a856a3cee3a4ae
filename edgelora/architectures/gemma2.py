"""Gemma 2 (arXiv:2408.00118): norms on both sides of each block, soft-capped scores and logits, every other layer
looking at a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelora.architectures.config import ATTENTION_BIAS, SANDWICH, Architecture, LlamaCpp, ModelConfig
from edgelora.architectures.gemma import OTHER_SCALE, has_that_scale, scale_in_llama_cpp, softcap
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

LAYERS_OF_27B = 46


def read_hf(config: Mapping[str, Any]) -> ModelConfig:
    """transformers' defaults where a config.json is silent: heads of 256, a window, both soft caps."""
    config = {"head_dim": 256, "tie_word_embeddings": True, **config}
    dims = hf_dimensions(config)
    return ModelConfig(
        model_type="gemma2",
        **dims,
        attn_logit_softcapping=softcap(config, "attn_logit_softcapping", 50.0),
        final_logit_softcapping=softcap(config, "final_logit_softcapping", 30.0),
        hidden_act=require_act(config, "hidden_activation", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",)),
        attention_multiplier=number(config, "query_pre_attn_scalar", 256, float) ** -0.5,
        embedding_multiplier=dims["hidden_size"] ** 0.5,
        sliding_window=optional_window(config, 4096),
        layer_types=hf_layer_types(config, dims["num_hidden_layers"], every(2, dims["num_hidden_layers"])),
    )


def read_gguf(file: GGUFFile) -> ModelConfig:
    """The factor of q·k is not stored: it is the one that llama.cpp takes."""
    dims = gguf_dimensions(file)
    layers = dims["num_hidden_layers"]
    return ModelConfig(
        model_type="gemma2",
        **dims,
        attn_logit_softcapping=file.get("gemma2.attn_logit_softcapping", float, 50.0),
        final_logit_softcapping=file.get("gemma2.final_logit_softcapping", float, 30.0),
        hidden_act="gelu_pytorch_tanh",
        attention_multiplier=scale_in_llama_cpp(dims, LAYERS_OF_27B),
        embedding_multiplier=dims["hidden_size"] ** 0.5,
        sliding_window=file.get("gemma2.attention.sliding_window", int, 4096),
        layer_types=gguf_pattern(file, layers, every(2, layers)),
    )


def otherwise_in_llama_cpp(config: ModelConfig) -> str | None:
    """What llama.cpp would compute otherwise than this config says, or None."""
    c = config
    if c.attn_logit_softcapping is None or c.final_logit_softcapping is None or c.sliding_window is None:
        return "its missing soft cap or window, for which it takes a default"
    if not c.tie_word_embeddings:
        return "its own head, for which it takes the embedding"
    return None if has_that_scale(c, LAYERS_OF_27B) else OTHER_SCALE


GEMMA2 = Architecture(
    model_type="gemma2",
    gguf_name="gemma2",
    read_hf=read_hf,
    read_gguf=read_gguf,
    norms=SANDWICH,
    norm_shift=1.0,
    bias_settings=ATTENTION_BIAS,
    llama_cpp=LlamaCpp(
        applies_window=True,
        states_window=True,
        scales_embeds=True,
        keys={key: key for key in ("attn_logit_softcapping", "final_logit_softcapping")},
        otherwise=otherwise_in_llama_cpp,
    ),
)
