"""From a GGUF file to the weights of a decoder: what went in comes out, bit for bit, and what cannot be is refused."""

from __future__ import annotations

import base64
import json
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type
from gguf.constants import GGUFValueType as Kind

from converters.metadata import copy_metadata
from edgelora.architectures import ARCHITECTURES
from edgelora.architectures.config import rows_to_gguf, rows_to_hf
from edgelora.architectures.names import gguf_row_order, hf_row_order
from edgelora.base import ggml
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.base.weights import DENSE, from_rows
from edgelora.errors import AdapterError, BaseModelError, FileFormatError
from edgelora.files.contract import LINEAGE_KEY, differences, read_contract
from edgelora.files.gguf import GGUFFile

KINDS = [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_K, Type.Q6_K]
BY_NAME = {"ids": lambda kind: kind.name}


def edited(source, out, metadata=(), tensors=(), drop=()):
    """A copy of a GGUF: `metadata` {key: (type, value)} and float32 `tensors` set, the tensors of `drop` left out."""
    file, metadata, tensors = GGUFFile(source), dict(metadata), dict(tensors)
    writer = gguf.GGUFWriter(out, metadata.pop("general.architecture", (None, file.architecture))[1])
    copy_metadata(file, writer, leave_out=metadata)
    for key, (kind, value, *item) in metadata.items():
        writer.add_key_value(key, value, kind, *item)
    for name, info in file.tensors.items():
        if name not in drop and name not in tensors:
            rows = file.rows(name)
            stored = rows.view(np.float32).reshape(-1) if len(info.shape) == 1 else rows
            writer.add_tensor(name, stored, raw_dtype=info.type)
    for name, value in tensors.items():
        writer.add_tensor(name, value.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def weights_of(decoder):
    """Every weight of a decoder as float32, under HF's names."""
    found = {name: linear.weight.dequantize().clone() for name, linear in decoder.linears.items()}
    found["model.embed_tokens"] = decoder.embedding.dequantize().clone()
    found["model.norm"] = decoder.model.norm.weight
    for i, layer in enumerate(decoder.model.layers):
        found[f"model.layers.{i}.input_layernorm"] = layer.input_layernorm.weight
        found[f"model.layers.{i}.post_attention_layernorm"] = layer.post_attention_layernorm.weight
    if decoder.head is not decoder.embedding:
        found["lm_head"] = decoder.head.dequantize().clone()
    return {f"{name}.weight": value.numpy() for name, value in found.items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS, **BY_NAME)
def test_weights_are_the_tensors_that_went_in(make_tiny, kind, tied):
    tiny = make_tiny(kind, tied=tied)
    base = open_base(tiny.path)
    found = weights_of(build_decoder(base))
    assert base.config == replace(tiny.config, rms_norm_eps=float(np.float32(1e-5)))  # GGUF keeps it in 32 bits
    assert found.keys() == tiny.weights.keys()
    for name, value in tiny.weights.items():
        np.testing.assert_array_equal(found[name].view(np.uint32), value.view(np.uint32), err_msg=name)


@pytest.mark.parametrize("kind", KINDS, **BY_NAME)
def test_gather_rows_and_dequantize_agree(make_tiny, kind):
    weight = build_decoder(open_base(make_tiny(kind).path)).embedding
    whole = weight.dequantize().clone()
    assert weight.shape == (512, 256)
    assert torch.equal(weight.rows(100, 103), whole[100:103])
    assert torch.equal(weight.gather(torch.tensor([511, 0, 0, 7])), whole[[511, 0, 0, 7]])
    assert torch.equal(weight.dequantize(torch.bfloat16), whole.bfloat16())


@pytest.mark.parametrize("kind", KINDS, **BY_NAME)
def test_a_weight_is_as_large_as_in_the_file(kind):
    stored = ggml.quantize(np.ones((4, 256), np.float32), kind)
    weight = from_rows(stored, kind, 256)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    assert weight.size_bytes == 4 * 256 // block * block_bytes


@pytest.mark.parametrize("kind", KINDS, **BY_NAME)
def test_what_gather_returns_is_the_callers_own(kind):
    weight = from_rows(ggml.quantize(np.ones((4, 256), np.float32), kind), kind, 256)
    before = weight.dequantize().clone()
    weight.gather(torch.tensor([1])).zero_()
    assert before.all()
    assert torch.equal(weight.dequantize(), before)


def test_a_decoder_over_blocks_maps_the_file(make_tiny):
    tiny = make_tiny(Type.Q4_K)
    base = open_base(tiny.path)
    linears = build_decoder(base).linears
    for name, linear in linears.items():
        mapped = np.shares_memory(linear.weight.blocks, base.file.rows(base.tensor_of(name)))
        assert mapped == (hf_row_order(base.architecture, base.config, name) is None), name


# -- rotary rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_rows", "heads"), [(8, 1), (8, 2), (96, 3), (256, 4), (512, 8)])
def test_rotary_rows_move_as_llama_cpp_moves_them(n_rows, heads):
    w = np.arange(n_rows * 3).reshape(n_rows, 3)
    theirs = w.reshape(heads, 2, n_rows // heads // 2, 3).swapaxes(1, 2).reshape(w.shape)  # LlamaModel.permute
    np.testing.assert_array_equal(w[rows_to_gguf(n_rows, heads)], theirs)
    np.testing.assert_array_equal(w[rows_to_gguf(n_rows, heads)][rows_to_hf(n_rows, heads)], w)
    np.testing.assert_array_equal(w[rows_to_hf(n_rows, heads)][rows_to_gguf(n_rows, heads)], w)


def test_llama_moves_queries_and_keys_only(tiny):
    moved = {m for m in tiny.linears if gguf_row_order(ARCHITECTURES["llama"], tiny.config, m) is not None}
    assert moved == {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qk"}


# -- fingerprint --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, **BY_NAME)
def test_fingerprint_survives_quantization(make_tiny, tiny, kind):
    original, stored = open_base(tiny.path), open_base(make_tiny(kind).path)
    assert differences(original.fingerprint, stored.fingerprint, stored.quant) == []
    assert original.fingerprint.short == stored.fingerprint.short


def test_fingerprint_of_a_spelled_out_head_is_that_of_a_tied_one(tiny, tmp_path):
    untied = edited(
        tiny.path, tmp_path / "untied.gguf", tensors={"output.weight": tiny.weights["model.embed_tokens.weight"]}
    )
    base = open_base(untied)
    assert not base.config.tie_word_embeddings
    assert base.fingerprint == open_base(tiny.path).fingerprint


def changed_vocabulary(tiny):
    tokens = list(GGUFFile(tiny.path).get("tokenizer.ggml.tokens", list))
    tokens[-1], tokens[-2] = tokens[-2], tokens[-1]
    return {"metadata": {"tokenizer.ggml.tokens": (Kind.ARRAY, tokens, Kind.STRING)}}


CHANGES = {
    "the vocabulary is another one": changed_vocabulary,
    "the norm weights are others": lambda tiny: {
        "tensors": {"output_norm.weight": tiny.weights["model.norm.weight"] * 1.001}
    },
    "the weights differ by": lambda tiny: {
        "tensors": {"blk.1.ffn_up.weight": tiny.weights["model.layers.1.mlp.up_proj.weight"] * 1.1}
    },
    "the file has been merged with an adapter": lambda _: {
        "metadata": {LINEAGE_KEY: (Kind.STRING, json.dumps(["abc:1"]))}
    },
    "rope_theta is 50000.0, expected 10000.0": lambda _: {"metadata": {"llama.rope.freq_base": (Kind.FLOAT32, 5e4)}},
    "rms_norm_eps is": lambda _: {"metadata": {"llama.attention.layer_norm_rms_epsilon": (Kind.FLOAT32, 1e-6)}},
}


@pytest.mark.parametrize("said", CHANGES)
def test_fingerprint_tells_another_model_by(tiny, tmp_path, said):
    wanted = open_base(tiny.path)
    found = open_base(edited(tiny.path, tmp_path / "other.gguf", **CHANGES[said](tiny)))
    faults = differences(wanted.fingerprint, found.fingerprint, found.quant)
    assert [fault for fault in faults if not fault.startswith(said)] == []
    assert len(faults) == 1


def test_a_contract_whose_sketch_is_no_number_is_refused_as_it_is_read(tiny):
    fingerprint = open_base(tiny.path).fingerprint
    norms = fingerprint.row_norms().astype(np.float16)
    for forged in (np.nan, np.inf):
        norms[3] = forged
        stated = fingerprint.model_copy(update={"sketch": base64.b64encode(norms.tobytes()).decode()})
        with pytest.raises(AdapterError, match=r"base\.sketch: .*a norm that is not finite"):
            read_contract(json.dumps({"base": stated.model_dump(mode="json")}), "mine")


def test_the_original_of_a_merged_model_is_another_model(tiny, tmp_path):
    merged = edited(tiny.path, tmp_path / "merged.gguf", metadata={LINEAGE_KEY: (Kind.STRING, '["abc:1"]')})
    faults = differences(open_base(merged).fingerprint, open_base(tiny.path).fingerprint, "F32")
    assert faults == ["the file is the original, not the merged model"]


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0], **BY_NAME)
def test_fingerprint_tells_another_seed(make_tiny, tiny, kind):
    other = open_base(make_tiny(kind, seed=1).path)
    faults = differences(open_base(tiny.path).fingerprint, other.fingerprint, other.quant)
    assert faults[0] == "the norm weights are others"
    assert faults[1].endswith(f"more than {kind.name} explains")


# -- faults -------------------------------------------------------------------------------------------------------


def fault_of(path):
    with pytest.raises(BaseModelError) as e:
        open_base(path)
    assert e.value.why
    assert e.value.fix
    return e.value


def test_a_folder_with_one_model_is_that_model(tiny, tmp_path):
    shutil.copy(tiny.path, tmp_path / "only.gguf")
    (tmp_path / "README.md").write_text("not a model")
    assert open_base(tmp_path).path == tmp_path / "only.gguf"


def test_a_folder_without_a_model_is_refused(tmp_path):
    assert fault_of(tmp_path).what == f"{tmp_path}: no models in this folder"


def test_a_folder_with_two_models_is_refused_and_names_them(tiny, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(tiny.path, tmp_path / name)
    fault = fault_of(tmp_path)
    assert fault.what == f"{tmp_path}: 2 models in this folder"
    assert fault.fix == "pass the path of one of a.gguf, b.gguf"


def test_a_checkpoint_beside_a_gguf_is_not_guessed_between(tiny, tmp_path):
    shutil.copy(tiny.path, tmp_path / "a.gguf")
    (tmp_path / "config.json").write_text("{}")
    fault = fault_of(tmp_path)
    assert fault.what == f"{tmp_path}: 2 models in this folder"
    assert "a.gguf" in fault.fix
    assert "checkpoint" in fault.fix


def test_an_adapter_is_no_base_and_says_so(tiny, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "this is an adapter" in fault_of(tmp_path).what
    path = edited(tiny.path, tmp_path / "x.gguf", metadata={"general.type": (Kind.STRING, "adapter")})
    assert "this is an adapter" in fault_of(path).what


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_template_is_none(tiny, tmp_path, text):
    path = edited(tiny.path, tmp_path / "x.gguf", metadata={"tokenizer.chat_template": (Kind.STRING, text)})
    assert open_base(path).template_source is None
    assert open_base(path, "chatml").template_source


def test_heads_that_every_layer_states_alike_are_one_number(tiny, tmp_path):
    key = "llama.attention.head_count_kv"
    alike = edited(tiny.path, tmp_path / "a.gguf", metadata={key: (Kind.ARRAY, [2, 2], Kind.UINT32)})
    assert open_base(alike).config.num_key_value_heads == 2
    other = edited(tiny.path, tmp_path / "b.gguf", metadata={key: (Kind.ARRAY, [2, 4], Kind.UINT32)})
    assert "differs from layer to layer" in fault_of(other).what


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(FileFormatError, match="no such file"):
        open_base(tmp_path / "none.gguf")


def test_a_path_that_cannot_be_is_refused(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 300)
    assert fault_of(long).what == f"{long}: cannot be read (File name too long)"

    def closed(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", closed)  # root may enter everywhere
    fault = fault_of(tmp_path / "private" / "base.gguf")
    assert fault.what == f"{tmp_path / 'private' / 'base.gguf'}: cannot be read (Permission denied)"
    assert fault.fix == "check the path, and the rights of the folders in it"


def test_an_unknown_architecture_is_refused(tiny, tmp_path):
    path = edited(tiny.path, tmp_path / "x.gguf", metadata={"general.architecture": (Kind.STRING, "mamba")})
    assert "architecture mamba" in fault_of(path).what


def test_all_faults_of_the_tensors_are_named_at_once(tiny, tmp_path):
    wrong = {"blk.1.attn_k.weight": np.zeros((64, 256)), "output_norm.weight": np.zeros(128)}
    path = edited(tiny.path, tmp_path / "x.gguf", tensors=wrong, drop=["blk.0.ffn_up.weight", "blk.1.attn_norm.weight"])
    faults = fault_of(path).what.removeprefix(f"{path}: ").split("; ")
    assert sorted(faults) == [
        "blk.0.ffn_up.weight is missing",
        "blk.1.attn_k.weight is (64, 256), expected (128, 256)",
        "blk.1.attn_norm.weight is missing",
        "output_norm.weight is (128,), expected (256,)",
    ]


def test_many_faults_are_counted(tiny, tmp_path):
    path = edited(tiny.path, tmp_path / "x.gguf", drop=[name for name in GGUFFile(tiny.path).tensors if "blk" in name])
    assert fault_of(path).what.endswith(" and 13 more")  # 2 layers of 7 linears and 2 norms, 5 of them shown


def test_a_file_without_embeddings_is_no_base(tiny, tmp_path):
    assert "token_embd" in fault_of(edited(tiny.path, tmp_path / "x.gguf", drop=["token_embd.weight"])).what


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("llama.rope.scaling.type", (Kind.STRING, "spiral"), "spiral"),
        ("llama.rope.scaling.alpha", (Kind.FLOAT32, 4.0), "llama.rope.scaling.alpha"),
        ("llama.rope.dimension_count", (Kind.UINT32, 32), "rotate in part"),
        ("llama.rope.dimension_count", (Kind.UINT32, 128), "rope settings"),
        ("llama.rope.freq_base", (Kind.FLOAT32, 0.0), "rope settings"),
        ("llama.rope.scaling.attn_factor", (Kind.FLOAT32, 1.5), "rope settings"),
        ("llama.attention.layer_norm_rms_epsilon", (Kind.FLOAT32, 0.0), "layer_norm_rms_epsilon is 0"),
        ("llama.expert_count", (Kind.UINT32, 8), "0 of 8 experts"),
        ("llama.attention.value_length", (Kind.UINT32, 32), "values of 32"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(tiny, tmp_path, key, value, said):
    assert said in fault_of(edited(tiny.path, tmp_path / "x.gguf", metadata={key: value})).what


def test_the_window_that_llama_cpp_ignores_is_kept(tiny, tmp_path):
    path = edited(tiny.path, tmp_path / "x.gguf", metadata={"llama.attention.sliding_window": (Kind.UINT32, 100)})
    base = open_base(path)
    assert base.config.window(0) == base.context == 100
    assert open_base(tiny.path).config.window(0) is None


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.attn_q.bias", "blk.1.attn_k.bias", "blk.0.ffn_down.bias"])
def test_a_tensor_that_the_decoder_would_leave_out_is_refused(tiny, tmp_path, name):
    missing = name.replace("blk.0", "blk.1")  # a bias in one layer is one that the others lack
    assert missing in fault_of(edited(tiny.path, tmp_path / "x.gguf", tensors={name: np.ones(256)})).what


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.embedding_length", 0),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count_kv", 0),
        ("llama.attention.head_count_kv", 3),
        ("llama.attention.key_length", 63),
        ("llama.rope.dimension_count", 32),
        ("llama.block_count", 1 << 31),
    ],
)
def test_dimensions_that_cannot_be_are_refused(tiny, tmp_path, key, value):
    fault_of(edited(tiny.path, tmp_path / "x.gguf", metadata={key: (Kind.UINT32, value)}))


def test_more_layers_than_tensors_are_refused_at_once(tiny, tmp_path, monkeypatch):
    """A file may claim two billion: their names alone would fill the memory before one of them was missed."""
    path = edited(tiny.path, tmp_path / "x.gguf", metadata={"llama.block_count": (Kind.UINT32, 10_000)})
    monkeypatch.setattr(gguf, "get_tensor_name_map", lambda *_: pytest.fail("names were made for every layer claimed"))
    fault_of(path)


def test_a_model_without_template_says_so_when_asked_for_it(make_tiny):
    base = open_base(make_tiny(template=None).path)
    with pytest.raises(BaseModelError, match="no chat template"):
        _ = base.template


def test_every_float_type_has_a_torch_type():
    assert set(DENSE).isdisjoint(ggml.DEQUANTIZE)
    assert {torch.finfo(dtype).bits // 8 for dtype in DENSE.values()} == {2, 4}
