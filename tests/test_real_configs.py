"""The config.json files of real models are read as transformers reads them: dimensions, windows and rotations.

`configs/real.json` holds their numbers, written down from the published files; no weights are needed.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from edgelora.architectures import ARCHITECTURES
from edgelora.architectures.config import FULL, SLIDING
from edgelora.architectures.metadata import gguf_metadata, unlike_llama_cpp
from edgelora.nn.rotary import inverse_frequencies

REAL = json.loads((Path(__file__).parent / "configs" / "real.json").read_text(encoding="utf-8"))
SAME = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
)  # fmt: skip


def theirs_of(name: str) -> transformers.PretrainedConfig:
    config = {key: value for key, value in REAL[name].items() if key not in ("model_type", "quantization_config")}
    return transformers.AutoConfig.for_model(REAL[name]["model_type"], **config)


@pytest.mark.parametrize("name", REAL)
def test_dimensions_and_windows_are_those_of_transformers(name):
    theirs = theirs_of(name)
    ours = ARCHITECTURES[REAL[name]["model_type"]].read_hf(REAL[name])
    assert {key: getattr(ours, key) for key in SAME} == {key: getattr(theirs, key) for key in SAME}
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    types, window = getattr(theirs, "layer_types", None), getattr(theirs, "sliding_window", None)
    for layer in range(ours.num_hidden_layers):
        assert ours.window(layer) == (window if types is None or types[layer] == SLIDING else None)


@pytest.mark.parametrize("name", REAL)
def test_rotations_are_those_of_transformers(name):
    theirs = theirs_of(name)
    ours = ARCHITECTURES[REAL[name]["model_type"]].read_hf(REAL[name])
    nested = FULL in theirs.rope_parameters
    ropes = {FULL: ours.rope, SLIDING: ours.rope_local} if nested else {None: ours.rope}
    for kind, rope in ropes.items():
        given = theirs.rope_parameters[kind] if nested else theirs.rope_parameters
        if given["rope_type"] == "default":
            share = given.get("partial_rotary_factor", 1.0)
            dim = int(ours.head_dim * share)
            frequencies = 1 / given["rope_theta"] ** (torch.arange(0, dim, 2) / dim)
            factor = 1.0
        else:
            layer = {"layer_type": kind} if nested else {}
            frequencies, factor = ROPE_INIT_FUNCTIONS[given["rope_type"]](theirs, "cpu", **layer)
        torch.testing.assert_close(inverse_frequencies(rope), frequencies, rtol=1e-5, atol=0)
        assert rope.attention_factor == pytest.approx(factor)


@pytest.mark.parametrize("name", REAL)
def test_llama_cpp_runs_them(name):
    architecture = ARCHITECTURES[REAL[name]["model_type"]]
    config = architecture.read_hf(REAL[name])
    assert unlike_llama_cpp(architecture, config) == []
    keys = gguf_metadata(architecture, config)
    assert keys[f"{architecture.gguf_name}.context_length"] > 0
    assert all(key.startswith(f"{architecture.gguf_name}.") for key in keys)
