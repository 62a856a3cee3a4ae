"""Granite 3 (dense): Llama with multipliers on embeddings, residuals, scores and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelora.architectures.config import ATTENTION_BIAS, MLP_BIAS, QKV, Architecture, LlamaCpp, ModelConfig
from edgelora.architectures.reading import gguf_dimensions, hf_dimensions, number, require_act
from edgelora.errors import BaseModelError
from edgelora.files.gguf import GGUFFile

SCALES = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}


def read_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Its four multipliers are 1 where a config.json is silent."""
    require_act(config, "hidden_act", "silu")
    return ModelConfig(
        model_type="granite", **hf_dimensions(config), **{name: number(config, name, 1.0, float) for name in SCALES}
    )


def read_gguf(file: GGUFFile) -> ModelConfig:
    """A multiplier of 0 is one that was not said. Raises BaseModelError for a model without rope."""
    if not file.get("granite.rope.scaling.finetuned", bool, True):
        raise BaseModelError(
            what=f"{file.path}: a Granite without rope",
            why="llama.cpp switches positions off by this key, which is not computed yet",
            fix="use a dense Granite 3 model",
        )
    dims = gguf_dimensions(file)
    found: dict[str, Any] = {field: file.get(f"granite.{key}", float, 0.0) or 1.0 for field, key in SCALES.items()}
    if not file.get("granite.attention.scale", float, 0.0):
        found["attention_multiplier"] = dims["head_dim"] ** -0.5
    return ModelConfig(model_type="granite", **dims, **found)


GRANITE = Architecture(
    model_type="granite",
    gguf_name="granite",
    read_hf=read_hf,
    read_gguf=read_gguf,
    scales_embeds=True,
    pairs_rotary_rows=True,
    bias_settings=ATTENTION_BIAS | MLP_BIAS,
    llama_cpp=LlamaCpp(
        reads_rope_factors=True,
        biases=(*QKV, "self_attn.o_proj", *MLP_BIAS["mlp_bias"]),
        whole_heads=True,
        scales_embeds=True,
        keys=SCALES,
    ),
)
