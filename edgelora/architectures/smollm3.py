"""SmolLM3: Llama whose every fourth layer does not rotate (NoPE, arXiv:2501.18795)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelora.architectures.config import ATTENTION_BIAS, FULL, MLP_BIAS, SLIDING, Architecture, LlamaCpp, ModelConfig
from edgelora.architectures.reading import (
    gguf_dimensions,
    hf_dimensions,
    hf_layer_types,
    number,
    optional_window,
    require_act,
)
from edgelora.errors import BaseModelError
from edgelora.files.gguf import GGUFFile

PERIOD_IN_LLAMA_CPP = 4


def read_hf(config: Mapping[str, Any]) -> ModelConfig:
    """`no_rope_layers` has a 1 where a layer does rotate. Raises BaseModelError if it does not speak of every layer."""
    require_act(config, "hidden_act", "silu")
    dims = hf_dimensions({"num_key_value_heads": 4, "tie_word_embeddings": True, **config}, theta=2e6)
    layers = dims["num_hidden_layers"]
    rotates = config.get("no_rope_layers")  # 1 where a layer does rotate, whatever the name says
    if rotates is None:
        period = number(config, "no_rope_layer_interval", PERIOD_IN_LLAMA_CPP)
        rotates = [(i + 1) % period != 0 for i in range(layers)]
    if not isinstance(rotates, list) or len(rotates) != layers:
        raise BaseModelError(
            what=f"config.json: no_rope_layers does not speak of {layers} layers",
            why="which layers know positions cannot be known without it",
            fix="download the checkpoint again",
        )
    window = optional_window(config) if config.get("use_sliding_window") else None
    return ModelConfig(
        model_type="smollm3",
        **dims,
        layers_without_rope=tuple(i for i, rotated in enumerate(rotates) if not rotated),
        sliding_window=window,
        layer_types=hf_layer_types(config, layers, tuple(FULL if r else SLIDING for r in rotates)) if window else None,
    )


def read_gguf(file: GGUFFile) -> ModelConfig:
    """Which layers rotate is not stored: all but every fourth, as llama.cpp has it."""
    dims = gguf_dimensions(file)
    return ModelConfig(
        model_type="smollm3", **dims, layers_without_rope=_without_rope_in_llama_cpp(dims["num_hidden_layers"])
    )


def _without_rope_in_llama_cpp(layers: int) -> tuple[int, ...]:
    return tuple(range(PERIOD_IN_LLAMA_CPP - 1, layers, PERIOD_IN_LLAMA_CPP))


def otherwise_in_llama_cpp(config: ModelConfig) -> str | None:
    """What llama.cpp would compute otherwise than this config says, or None."""
    same = config.layers_without_rope == _without_rope_in_llama_cpp(config.num_hidden_layers)
    return None if same else "the layers that do not rotate, for which it takes every fourth"


SMOLLM3 = Architecture(
    model_type="smollm3",
    gguf_name="smollm3",
    read_hf=read_hf,
    read_gguf=read_gguf,
    pairs_rotary_rows=True,
    bias_settings=ATTENTION_BIAS | MLP_BIAS,
    llama_cpp=LlamaCpp(otherwise=otherwise_in_llama_cpp),
)
