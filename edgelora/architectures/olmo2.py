"""OLMo 2 (arXiv:2501.00656): norms behind each block instead of before it, and one over all of q and all of k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelora.architectures.config import ATTENTION_BIAS, POST_NORM, Architecture, LlamaCpp, ModelConfig
from edgelora.architectures.reading import gguf_dimensions, hf_dimensions, require_act
from edgelora.errors import BaseModelError
from edgelora.files.gguf import GGUFFile


def read_hf(config: Mapping[str, Any]) -> ModelConfig:
    """transformers' epsilon, 1e-5, where a config.json is silent."""
    require_act(config, "hidden_act", "silu")
    return ModelConfig(model_type="olmo2", **hf_dimensions({"rms_norm_eps": 1e-5, **config}))


def read_gguf(file: GGUFFile) -> ModelConfig:
    """Raises BaseModelError for an OLMo 3, which llama.cpp keeps under this name."""
    if file.get("olmo2.attention.sliding_window", int, 0):
        raise BaseModelError(
            what=f"{file.path}: an OLMo 3 with windows",
            why="it rotates its layers with and without a window differently, which is not computed yet",
            fix="use an OLMo 2 model",
        )
    return ModelConfig(model_type="olmo2", **gguf_dimensions(file))


def otherwise_in_llama_cpp(config: ModelConfig) -> str | None:
    """What llama.cpp would compute otherwise than this config says, or None."""
    return "its tied head, which it does not read" if config.tie_word_embeddings else None


OLMO2 = Architecture(
    model_type="olmo2",
    gguf_name="olmo2",
    read_hf=read_hf,
    read_gguf=read_gguf,
    norms=POST_NORM,
    qk_norm="row",
    bias_settings=ATTENTION_BIAS,
    llama_cpp=LlamaCpp(whole_heads=True, otherwise=otherwise_in_llama_cpp),
)
