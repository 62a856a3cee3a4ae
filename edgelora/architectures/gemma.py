"""What Gemma 2 and 3 share: how llama.cpp scales their scores, and soft caps that may be null."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelora.architectures.config import ModelConfig
from edgelora.architectures.reading import number

OTHER_SCALE = "the scale of its attention (query_pre_attn_scalar)"


def scale_in_llama_cpp(dims: Mapping[str, Any], layers_of_27b: int) -> float:
    """The factor of q·k: by the width of a head, but for the 27B model, which llama.cpp knows by its layers."""
    d, heads = dims["hidden_size"], dims["num_attention_heads"]
    width = d // heads if dims["num_hidden_layers"] == layers_of_27b else dims["head_dim"]
    return float(width**-0.5)


def has_that_scale(config: ModelConfig, layers_of_27b: int) -> bool:
    """Whether llama.cpp would multiply q·k by the factor that `config` has."""
    return abs(scale_in_llama_cpp(vars(config), layers_of_27b) / config.attention_scale - 1) < 1e-6


def softcap(config: Mapping[str, Any], key: str, default: float | None = None) -> float | None:
    """A soft cap of a config.json: `default` where the key is missing, None where it is null."""
    return None if config.get(key, default) is None else float(number(config, key, default, float))
