"""Gemma 3's text models (arXiv:2503.19786): five layers with a window for each without, a rope of their own for those,
and a norm over each head of q and k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelora.architectures.config import ATTENTION_BIAS, FULL, SANDWICH, SLIDING, Architecture, LlamaCpp, ModelConfig
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
from edgelora.architectures.rope import Rope, read_gguf_rope, read_hf_rope
from edgelora.errors import BaseModelError
from edgelora.files.gguf import GGUFFile

LAYERS_OF_27B = 62


def read_hf(config: Mapping[str, Any]) -> ModelConfig:
    """transformers' defaults where a config.json is silent. Raises BaseModelError for an embedding model."""
    if config.get("use_bidirectional_attention"):
        raise BaseModelError(
            what="config.json: tokens look at those behind them (use_bidirectional_attention)",
            why="this is an embedding model; edgelora trains models that speak",
            fix="use a Gemma 3 text model",
        )
    defaults = {"head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262_208,
                "max_position_embeddings": 131_072, "tie_word_embeddings": True}  # fmt: skip
    config = {**defaults, **config}
    dims = hf_dimensions(config, theta=1e6, layer_type=FULL)
    layers, head_dim = dims["num_hidden_layers"], dims["head_dim"]
    period = number(config, "sliding_window_pattern", number(config, "_sliding_window_pattern", 6))
    return ModelConfig(
        model_type="gemma3_text",
        **dims,
        hidden_act=require_act(config, "hidden_activation", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",)),
        attention_multiplier=number(config, "query_pre_attn_scalar", 256, float) ** -0.5,
        embedding_multiplier=dims["hidden_size"] ** 0.5,
        attn_logit_softcapping=softcap(config, "attn_logit_softcapping"),
        final_logit_softcapping=softcap(config, "final_logit_softcapping"),
        sliding_window=optional_window(config, 4096),
        layer_types=hf_layer_types(config, layers, every(period, layers)),
        rope_local=_local_rope(config, head_dim),
    )


def _local_rope(config: Mapping[str, Any], head_dim: int) -> Rope:
    """The rope of the sliding layers: a table of its own, or one number in older configs."""
    nested = config.get("rope_parameters")
    own = nested.get(SLIDING) if isinstance(nested, Mapping) else None
    theta = number(config, "rope_local_base_freq", 1e4, float)
    alone = {"max_position_embeddings": config["max_position_embeddings"], "rope_parameters": own}
    return read_hf_rope(alone, head_dim, theta=theta)


def read_gguf(file: GGUFFile) -> ModelConfig:
    """The factor of q·k is not stored: it is the one that llama.cpp takes. Its sliding layers are never stretched."""
    dims = gguf_dimensions(file)
    layers, head_dim = dims["num_hidden_layers"], dims["head_dim"]
    window = file.get("gemma3.attention.sliding_window", int, 0)
    local = read_gguf_rope(file, head_dim, "freq_base_swa")
    return ModelConfig(
        model_type="gemma3_text",
        **dims,
        hidden_act="gelu_pytorch_tanh",
        attention_multiplier=scale_in_llama_cpp(dims, LAYERS_OF_27B),
        embedding_multiplier=dims["hidden_size"] ** 0.5,
        final_logit_softcapping=file.get("gemma3.final_logit_softcapping", float, 0.0) or None,
        sliding_window=window or None,
        layer_types=gguf_pattern(file, layers, every(6, layers)),
        rope_local=Rope(local.theta, head_dim),  # a stretched context is the full layers' alone
    )


def otherwise_in_llama_cpp(config: ModelConfig) -> str | None:
    """What llama.cpp would compute otherwise than this config says, or None."""
    c = config
    if c.attn_logit_softcapping is not None:
        return "the soft cap of its attention"
    if c.rope_local is not None and c.rope_local.scaling != "default":
        return "the rope scaling of its sliding layers"
    return None if has_that_scale(c, LAYERS_OF_27B) else OTHER_SCALE


GEMMA3 = Architecture(
    model_type="gemma3_text",
    gguf_name="gemma3",
    read_hf=read_hf,
    read_gguf=read_gguf,
    norms=SANDWICH,
    norm_shift=1.0,
    bias_settings=ATTENTION_BIAS,
    qk_norm="head",
    llama_cpp=LlamaCpp(
        applies_window=True,
        states_window=True,
        keys={"final_logit_softcapping": "final_logit_softcapping"},
        otherwise=otherwise_in_llama_cpp,
    ),
)
