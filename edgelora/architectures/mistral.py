"""Mistral 7B and its kin: Llama with a sliding window over every layer. In GGUF it is a llama without the window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgelora.architectures.config import ModelConfig
from edgelora.architectures.llama import LLAMA
from edgelora.architectures.reading import hf_dimensions, optional_window, require_act


def read_hf(config: Mapping[str, Any]) -> ModelConfig:
    """transformers' defaults where a config.json is silent: 8 key-value heads, a window of 4096; null is no window."""
    require_act(config, "hidden_act", "silu")
    config = {"num_key_value_heads": 8, **config}
    return ModelConfig(model_type="mistral", **hf_dimensions(config), sliding_window=optional_window(config, 4096))


MISTRAL = replace(LLAMA, model_type="mistral", read_hf=read_hf, bias_settings={})
