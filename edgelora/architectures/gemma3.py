"""Gemma 3's text models (arXiv:2503.19786): five layers with a window for each without, a rope of their own for those,
and a norm over each head of q and k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelora.architectures.config import FULL, SANDWICH, SLIDING, Architecture, ModelConfig
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

# llama.cpp knows the 27B model by its layers and takes another scale of q·k for it
LAYERS_OF_27B = 62


def read_hf(config: Mapping[str, Any]) -> ModelConfig:
    if config.get("use_bidirectional_attention"):
        raise BaseModelError(
            what="config.json: tokens look at those behind them (use_bidirectional_attention)",
            why="this is an embedding model; edgelora trains models that speak",
            fix="use a Gemma 3 text model",
        )
    defaults = {"head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262_208,
                "max_position_embeddings": 131_072, "tie_word_embeddings": True}  # fmt: skip
    config = {**defaults, **config}
    dims = hf_dimensions(config)
    layers, head_dim, nested = dims["num_hidden_layers"], dims["head_dim"], "rope_parameters" in config
    dims["rope"] = read_hf_rope(config, head_dim, FULL, theta=1e6)
    cap = config.get("final_logit_softcapping")
    period = number(config, "sliding_window_pattern", number(config, "_sliding_window_pattern", 6))
    return ModelConfig(
        model_type="gemma3_text",
        **dims,
        hidden_act=require_act(config, "hidden_activation", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",)),
        attention_multiplier=number(config, "query_pre_attn_scalar", 256, float) ** -0.5,
        embedding_multiplier=dims["hidden_size"] ** 0.5,
        attn_logit_softcapping=_cap(config.get("attn_logit_softcapping")),
        final_logit_softcapping=_cap(cap),
        sliding_window=optional_window(config, 4096),
        layer_types=hf_layer_types(config, layers, every(period, layers)),
        rope_local=read_hf_rope(config, head_dim, SLIDING)
        if nested
        else Rope(number(config, "rope_local_base_freq", 1e4, float), head_dim),
    )


def _cap(value: Any) -> float | None:
    return None if value is None else number({"softcapping": value}, "softcapping", kind=float)


def read_gguf(file: GGUFFile) -> ModelConfig:
    dims = gguf_dimensions(file)
    layers, head_dim = dims["num_hidden_layers"], dims["head_dim"]
    window = file.get("gemma3.attention.sliding_window", int, 0)
    local = read_gguf_rope(file, head_dim, "freq_base_swa")
    return ModelConfig(
        model_type="gemma3_text",
        **dims,
        hidden_act="gelu_pytorch_tanh",
        attention_multiplier=_multiplier_in_llama_cpp(
            layers, dims["hidden_size"], dims["num_attention_heads"], head_dim
        ),
        embedding_multiplier=dims["hidden_size"] ** 0.5,
        final_logit_softcapping=_cap(file.get("gemma3.final_logit_softcapping", float)),
        sliding_window=window or None,
        layer_types=gguf_pattern(file, layers, every(6, layers)),
        rope_local=Rope(local.theta, head_dim),  # a stretched context is the full layers' alone
    )


def _multiplier_in_llama_cpp(layers: int, hidden_size: int, heads: int, head_dim: int) -> float:
    return float((hidden_size // heads if layers == LAYERS_OF_27B else head_dim) ** -0.5)


def unlike_llama_cpp(config: ModelConfig) -> str | None:
    c = config
    if c.attn_logit_softcapping is not None:
        return "the soft cap of its attention"
    if c.rope_local is not None and c.rope_local.scaling != "default":
        return "the rope scaling of its sliding layers"
    scale = _multiplier_in_llama_cpp(c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.head_dim)
    return None if abs(scale / c.attention_scale - 1) < 1e-6 else "the scale of its attention (query_pre_attn_scalar)"


GEMMA3 = Architecture(
    "gemma3_text", "gemma3", read_hf, read_gguf, norms=SANDWICH, norm_shift=1.0, qk_norm="head",
    window_in_llama_cpp=True, states_window=True, more_keys={"final_logit_softcapping": "final_logit_softcapping"},
    unlike_llama_cpp=unlike_llama_cpp,
)  # fmt: skip
