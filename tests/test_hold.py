"""How frozen weights are held: every way keeps the shape, comes as close as its bits allow, and trains."""

from __future__ import annotations

import json
from typing import get_args

import numpy as np
import pytest
import torch
import transformers
from gguf.constants import GGMLQuantizationType as Type

from edgelora.base import ggml
from edgelora.base.decoder import build_decoder
from edgelora.base.hold import BASE_FORMATS, BLOCKS, choose_base_dtype, hold
from edgelora.base.model import open_base
from edgelora.base.nf4 import NF4
from edgelora.base.tensors import Stored
from edgelora.base.weights import Dense, GGUFBlocks
from edgelora.config import TrainConfig
from edgelora.errors import ConfigError
from edgelora.kernels import load
from edgelora.training.run import run_training

# relative error of a matrix of normal numbers, a little above what was measured
ERROR = {"blocks": 0, "f32": 0, "f16": 3e-4, "bf16": 3e-3, "q8_0": 6e-3, "q6_k": 0.02, "q5_k": 0.04, "q5_1": 0.04,
         "q5_0": 0.05, "q4_k": 0.08, "q4_1": 0.08, "q4_0": 0.1, "iq4_nl": 0.08, "iq4_xs": 0.08, "nf4": 0.1,
         "q3_k": 0.17, "q2_k": 0.35}  # fmt: skip


def stored(columns: int = 256, kind: Type = Type.F32) -> Stored:
    values = np.random.default_rng(0).normal(0, 1, (32, columns)).astype(np.float32)
    return Stored(ggml.quantize(values, kind), kind, columns)


def test_the_table_is_what_the_settings_accept():
    accepted = get_args(TrainConfig.model_fields["base_dtype"].annotation)
    assert set(accepted) == {"auto", *BASE_FORMATS}
    assert set(ERROR) == set(BASE_FORMATS)


@pytest.mark.parametrize("how", BASE_FORMATS)
@pytest.mark.parametrize("kind", [Type.F32, Type.BF16])
def test_every_way_is_as_close_as_its_bits_allow(how, kind):
    original = stored(kind=kind)
    weight = hold(original, how)
    assert weight.shape == (32, 256)
    found, expected = weight.dequantize().clone().numpy(), original.floats()
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error <= ERROR[how]
    assert error > 0 or how in ("blocks", "f32", "bf16", "f16")
    assert torch.equal(weight.rows(3, 9), torch.from_numpy(found[3:9]))


@pytest.mark.parametrize("how", BLOCKS)
def test_blocks_made_on_opening_are_those_of_llama_quantize(how):
    weight = hold(stored(), how)
    assert isinstance(weight, GGUFBlocks)
    assert weight.kind.name.lower() == how
    np.testing.assert_array_equal(weight.blocks, ggml.quantize(stored().floats(), weight.kind))


FALLS_BACK = {"q4_k": Type.Q5_0, "q5_k": Type.Q5_1, "q6_k": Type.Q8_0, "q2_k": Type.Q4_0, "q3_k": Type.Q4_0,
              "iq4_xs": Type.IQ4_NL}  # fmt: skip


@pytest.mark.parametrize(("how", "becomes"), FALLS_BACK.items())
def test_rows_that_do_not_divide_fall_back_as_llama_quantize_does(how, becomes):
    weight = hold(stored(columns=96), how)
    assert isinstance(weight, GGUFBlocks)
    assert weight.kind == becomes


def test_rows_that_fit_no_block_stay_floats():
    weight = hold(stored(columns=40), "q4_k")
    assert isinstance(weight, Dense)
    assert weight.values.dtype == torch.float16


def test_a_type_that_is_there_already_is_not_quantized_twice():
    original = stored(kind=Type.Q8_0)
    assert np.shares_memory(hold(original, "q8_0").blocks, original.rows)
    assert np.shares_memory(hold(original, "blocks").blocks, original.rows)


def test_an_unknown_way_is_refused():
    with pytest.raises(ConfigError, match="int8"):
        hold(stored(), "int8")


@pytest.mark.parametrize("how", ["nf4", "bf16", "q8_0", "q4_k"])
def test_a_decoder_over_any_way_computes_nearly_the_same(tiny, how):
    base, ids = open_base(tiny.path), torch.arange(3, 60)
    exact, held = build_decoder(base), build_decoder(base, how)
    assert all(type(linear.weight) in (NF4, Dense, GGUFBlocks) for linear in held.linears.values())
    apart = (held.logits(ids) - exact.logits(ids)).norm() / exact.logits(ids).norm()
    assert 0 < apart < 0.5  # two layers of random weights: four bits leave a third of the logits' norm
    assert held.head is held.embedding  # what a vocabulary is stored as, it stays


@pytest.mark.parametrize("how", ["nf4", "f32", "q4_k"])
def test_training_over_any_way_learns_and_says_what_it_was(tiny, tmp_path, how):
    rows = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "lights"}, {"role": "assistant", "content": "on"}]}
    rows.write_text((json.dumps(row) + "\n") * 8, encoding="utf-8")
    run = run_training(TrainConfig(base=tiny.path, data=rows, out=tmp_path / "a", base_dtype=how, epochs=6, rank=4))
    assert run.losses[-1] < run.losses[0]
    contract = json.loads((tmp_path / "a" / "edgelora.json").read_text())
    assert contract["training"]["choices"]["base_dtype"]["value"] == how


# -- a mixture ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A Mixtral of eight experts in bfloat16, as a checkpoint."""
    folder = tmp_path_factory.mktemp("mixture")
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, max_position_embeddings=64,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return open_base(folder)


@pytest.mark.parametrize("how", ["nf4", "q4_k", "bf16"])
def test_a_router_stays_in_floats_and_experts_are_held_as_asked(mixture, how):
    block = build_decoder(mixture, how).model.layers[0].mlp
    assert isinstance(block.router, Dense)
    assert block.router.values.dtype == torch.float32
    assert type(block.experts[3].up) is type(
        hold(mixture.tensors.matrix("model.layers.0.self_attn.q_proj.weight"), how)
    )


def test_auto_counts_the_experts(mixture):
    experts = 2 * 8 * 3 * 256 * 256
    assert choose_base_dtype("auto", mixture, 3 * experts).value == "q4_k"  # two bytes each are more than half of it
    assert choose_base_dtype("auto", mixture, 64 << 30).value == "blocks"


# -- auto ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(load.library() is None, reason="no compiler was here at installation")
def test_auto_keeps_all_blocks_that_our_kernels_read(make_tiny):
    assert choose_base_dtype("auto", open_base(make_tiny(Type.Q6_K).path), 64 << 30).value == "blocks"


def test_auto_dequantizes_slow_blocks_once_where_ggml_alone_reads_them(make_tiny, monkeypatch):
    base = open_base(make_tiny(Type.Q6_K).path)
    monkeypatch.setattr(load, "library", lambda: None)
    assert choose_base_dtype("auto", base, 64 << 30).value == "f32"
    assert choose_base_dtype("auto", base, 1 << 20).value == "blocks"
    assert choose_base_dtype("auto", base, None).value == "blocks"


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_K, Type.Q4_0, Type.F32], ids=lambda kind: kind.name)
def test_auto_keeps_fast_blocks(make_tiny, kind):
    assert choose_base_dtype("auto", open_base(make_tiny(kind).path), 64 << 30).value == "blocks"


def test_what_is_asked_for_is_done(tiny):
    for how in BASE_FORMATS:
        assert choose_base_dtype(how, open_base(tiny.path), 0).value == how
