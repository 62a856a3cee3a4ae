"""Adapters merged into a base, in one pass from any base to any type: held to llama.cpp's quantizer, torch and PEFT."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from gguf.constants import GGMLQuantizationType as Type
from safetensors.numpy import save_file
from stirred import Stir
from test_export import llama_logits, make_adapter, make_dora, torch_logits

from converters.adapter_to_gguf import gguf_changes
from converters.base_to_gguf import write_base_gguf
from converters.imatrix import Importance, write_importance
from converters.merge import Part, Recipe, float_types, write_merged
from converters.metadata import copy_metadata
from converters.plan import QuantizeOptions, plan_types, write_plan
from converters.quantize import write_quantized
from edgelora.base import ggml
from edgelora.base.model import open_base
from edgelora.cli import run
from edgelora.errors import AdapterError, ConfigError, ExportError, OutputError
from edgelora.evaluate.fidelity import fidelity
from edgelora.files.contract import CERTIFICATE_KEY, CONTRACT_KEY, LINEAGE_KEY, read_contract
from edgelora.files.gguf import GGUFFile, Value
from edgelora.peft.adapter import Adapter, read_adapter, write_adapter
from edgelora.pipeline.export import export
from edgelora.pipeline.merge import MergeOptions, Wanted, merge, open_parts, write_gguf
from edgelora.pipeline.snap_back import snap_back_notes

ROOT = Path(__file__).resolve().parent.parent
QUANTS = ["Q8_0", "Q4_0", "Q4_K_M", "Q2_K", "IQ4_XS", "F16", "BF16", "F32"]


def saved(folder: Path, adapter: Adapter) -> Path:
    write_adapter(folder, adapter)
    return folder


def write(
    base: Path, adapters: list[tuple[Path, float]], out: Path, quant: str = "F16", imatrix: Path | None = None
) -> list[str]:
    """Merge without the check before the name, where a test compares bytes or words; returns the notes."""
    opened, parts = open_parts(base, adapters, allow_unverified=False)
    return write_gguf(out, opened, parts, Wanted.read(quant, MergeOptions(imatrix)))


def tensors(path: Path) -> dict[str, tuple[Type, bytes]]:
    """Each tensor of a GGUF: its type and its very bytes."""
    file = GGUFFile(path)
    return {name: (info.type, file.rows(name).tobytes()) for name, info in file.tensors.items()}


def write_checkpoint(folder: Path, model, n_shards: int = 2) -> Path:
    """A tiny model as a Hugging Face folder of float32, in shards; without a tokenizer of its own."""
    folder.mkdir()
    c = model.config
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size, "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads, "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim, "vocab_size": c.vocab_size, "max_position_embeddings": c.max_position_embeddings,
        "rms_norm_eps": c.rms_norm_eps, "rope_theta": c.rope.theta, "tie_word_embeddings": c.tie_word_embeddings,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "dtype": "float32",
    }))  # fmt: skip
    names, weight_map = sorted(model.weights), {}
    for i in range(n_shards):
        shard = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        part = {name: model.weights[name] for name in names[i::n_shards]}
        save_file(part, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def checkpoint(tiny, tmp_path, vocabulary, write_tokenizer) -> Path:
    """The tiny model's very weights as a checkpoint in two shards."""
    from conftest import TEMPLATE

    folder = write_checkpoint(tmp_path / "checkpoint", tiny)
    write_tokenizer(folder, vocabulary, TEMPLATE)
    return folder


# -- what is written, byte for byte -------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", QUANTS)
def test_with_nothing_to_add_it_is_llama_cpps_quantizer(tiny, tmp_path, quant):
    mine = saved(tmp_path / "mine", make_adapter(open_base(tiny.path)))
    write(tiny.path, [(mine, 0.0)], tmp_path / "ours.gguf", quant)
    write_quantized(tiny.path, tmp_path / "theirs.gguf", QuantizeOptions(quant))
    assert tensors(tmp_path / "ours.gguf") == tensors(tmp_path / "theirs.gguf")
    assert open_base(tmp_path / "ours.gguf").quant == quant


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0, Type.Q4_0])
@pytest.mark.parametrize("quant", ["Q4_K_M", "Q8_0", "F16"])
def test_merged_weights_are_quantized_from_float32(make_tiny, tmp_path, kind, quant):
    """Not from their F16 form: what is written is ggml's quantization of the exact sum."""
    path = make_tiny(kind).path
    base = open_base(path)
    one, two = make_adapter(base, seed=1), make_dora(base)
    adapters = [(saved(tmp_path / "one", one), 1.0), (saved(tmp_path / "two", two), -0.5)]
    write(path, adapters, tmp_path / "out.gguf", quant)
    found, rounded = GGUFFile(tmp_path / "out.gguf"), 0
    pairs = [(gguf_changes(one, base), 1.0), (gguf_changes(two, base), -0.5)]
    for name, info in found.tensors.items():
        stored = base.file.tensors[name]
        weight = ggml.dequantize(base.file.rows(name), stored.type, stored.shape[-1])
        merged = weight.copy()
        for adapter, scale in pairs:
            if name in adapter:
                merged += np.float32(scale) * adapter[name].change(weight)
        if name not in pairs[0][0] and info.type == stored.type:
            np.testing.assert_array_equal(found.rows(name), base.file.rows(name), err_msg=name)
        else:
            np.testing.assert_array_equal(found.rows(name), ggml.quantize(merged, info.type), err_msg=name)
            through_half = ggml.quantize(merged.astype(np.float16).astype(np.float32), info.type)
            rounded += not np.array_equal(through_half, found.rows(name))
    assert (rounded > 0) == (quant == "Q4_K_M" or quant == "Q8_0")  # so this test can tell


@pytest.mark.parametrize("quant", ["Q4_K_M", "F16", "BF16"])
def test_a_checkpoint_in_shards_and_its_gguf_merge_into_the_same(tiny, checkpoint, tmp_path, quant):
    mine = saved(tmp_path / "mine", make_adapter(open_base(tiny.path), alpha=4.0))
    assert len(list(checkpoint.glob("*.safetensors"))) == 2
    write(checkpoint, [(mine, 1.0)], tmp_path / "a.gguf", quant)
    write(tiny.path, [(mine, 1.0)], tmp_path / "b.gguf", quant)
    ours, theirs = tensors(tmp_path / "a.gguf"), tensors(tmp_path / "b.gguf")
    assert ours == theirs
    assert open_base(tmp_path / "a.gguf").identity == open_base(tmp_path / "b.gguf").identity
    assert sorted(p.name for p in tmp_path.glob("*.gguf")) == ["a.gguf", "b.gguf"]
    assert not list(tmp_path.glob(".edgelora-*"))


def importance_of(base, seed=0) -> Importance:
    """Some columns matter much more than others."""
    draw, tokens = np.random.default_rng(seed), 100
    sums, counts = {}, {}
    for name, info in base.items():
        if len(info.shape) > 1 and name != "token_embd.weight":
            n_matrices = info.shape[0] if len(info.shape) > 2 else 1
            sums[name] = draw.gamma(0.3, 100, (n_matrices, info.shape[-1])).astype(np.float32)
            counts[name] = np.full(n_matrices, tokens)
    return Importance(sums, counts, 1, tokens, ("rows.jsonl",))


@pytest.mark.parametrize(
    "quant",
    ["Q4_K_M", "IQ2_XXS", *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("IQ3_XXS", "IQ2_XS"))],
)
def test_importance_is_used_as_llama_cpp_uses_it(tiny, tmp_path, quant):
    importance = importance_of(GGUFFile(tiny.path).tensors)
    write_importance(tmp_path / "im.gguf", importance)
    mine = saved(tmp_path / "mine", make_adapter(open_base(tiny.path)))
    write(tiny.path, [(mine, 0.0)], tmp_path / "a.gguf", quant, tmp_path / "im.gguf")
    write_quantized(tiny.path, tmp_path / "b.gguf", QuantizeOptions(quant, imatrix=importance.weights()))
    assert tensors(tmp_path / "a.gguf") == tensors(tmp_path / "b.gguf")
    file = GGUFFile(tmp_path / "a.gguf")
    assert (file.get("quantize.imatrix.file", str), file.get("quantize.imatrix.chunks_count", int)) == ("im.gguf", 1)
    assert file.get("quantize.imatrix.entries_count", int) == len(importance.sums)


def test_each_expert_has_its_own_importance(tmp_path, vocabulary, write_tokenizer):
    config = transformers.MixtralConfig(
        vocab_size=512, hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=2, max_position_embeddings=512, num_local_experts=4, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).float().save_pretrained(tmp_path / "moe")
    write_tokenizer(tmp_path / "moe", vocabulary, None)
    base = open_base(tmp_path / "moe")
    write_base_gguf(tmp_path / "f32.gguf", base, "F32")
    importance = importance_of(GGUFFile(tmp_path / "f32.gguf").tensors)
    write_importance(tmp_path / "im.gguf", importance)
    mine = saved(tmp_path / "mine", make_adapter(base))
    write(tmp_path / "moe", [(mine, 0.0)], tmp_path / "a.gguf", "Q4_K_M", tmp_path / "im.gguf")
    write_quantized(tmp_path / "f32.gguf", tmp_path / "b.gguf", QuantizeOptions("Q4_K_M", imatrix=importance.weights()))
    assert GGUFFile(tmp_path / "a.gguf").tensors["blk.0.ffn_gate_exps.weight"].shape == (4, 256, 256)
    assert tensors(tmp_path / "a.gguf") == tensors(tmp_path / "b.gguf")


def test_a_plan_says_which_type_each_tensor_gets(tiny, checkpoint, tmp_path):
    plan = plan_types(tiny.path, QuantizeOptions("Q4_K_M")).with_types({"blk.1.attn_k.weight": Type.Q8_0})
    write_plan(tmp_path / "plan.toml", plan)
    mine, options = (
        saved(tmp_path / "mine", make_adapter(open_base(tiny.path))),
        MergeOptions(plan=tmp_path / "plan.toml"),
    )
    for base in (tiny.path, checkpoint):
        merge(base, [(mine, 1.0)], tmp_path / "out.gguf", options=options, overwrite=True)
        assert {name: kind for name, (kind, _) in tensors(tmp_path / "out.gguf").items()} == plan.types
        assert open_base(tmp_path / "out.gguf").quant == "Q4_K_M"
    with pytest.raises(ConfigError, match=r"--to Q8_0: the plan .* is one for Q4_K_M"):
        merge(tiny.path, [(mine, 1.0)], tmp_path / "other.gguf", quant="Q8_0", options=options)


# -- what it computes ---------------------------------------------------------------------------------------------


def test_merged_is_unmerged(tiny, tmp_path):
    base = open_base(tiny.path)
    merge(tiny.path, [(saved(tmp_path / "mine", make_adapter(base)), 1.0)], tmp_path / "merged.gguf")
    found = fidelity([(torch_logits(base, make_adapter(base)), llama_logits(tmp_path / "merged.gguf"))])
    assert found.kl_mean <= 1e-4  # weights rounded to F16 once


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0])
def test_llama_cpp_computes_a_merged_dora_as_torch_does(make_tiny, tmp_path, kind):
    path = make_tiny(kind).path
    base = open_base(path)
    merge(path, [(saved(tmp_path / "mine", make_dora(base)), 1.0)], tmp_path / "merged.gguf")
    theirs = llama_logits(tmp_path / "merged.gguf")
    found = fidelity([(torch_logits(base, make_dora(base)), theirs)])
    assert found.kl_mean <= 1e-4  # weights rounded to F16 once
    assert fidelity([(torch_logits(base, make_adapter(base)), theirs)]).kl_mean > 100 * found.kl_mean  # lengths matter


def test_a_file_of_another_alignment(tiny, tmp_path):
    reader, other = GGUFFile(tiny.path), tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(other, "llama")
    copy_metadata(reader, writer)
    writer.add_custom_alignment(64)
    for name, info in reader.tensors.items():
        writer.add_tensor(name, reader.rows(name).view(np.float32).reshape(info.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert GGUFFile(other).get("general.alignment", int) == 64
    mine = saved(tmp_path / "mine", make_adapter(open_base(other)))
    write(other, [(mine, 1.0)], tmp_path / "a.gguf")
    write(tiny.path, [(mine, 1.0)], tmp_path / "b.gguf")
    assert tensors(tmp_path / "a.gguf") == tensors(tmp_path / "b.gguf")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("dora", [False, True])
def test_a_folder_is_what_peft_merges(checkpoint, tmp_path, dora):
    import peft

    base = open_base(checkpoint)
    adapter = make_dora(base) if dora else make_adapter(base)
    modules = sorted({name.rpartition(".")[2] for name in adapter.tensors})
    config = {**adapter.config, "target_modules": modules, "use_dora": dora, "task_type": "CAUSAL_LM"}
    mine = saved(tmp_path / "mine", Adapter(config, adapter.tensors, adapter.contract))
    merged = merge(checkpoint, [(mine, 1.0)], tmp_path / "out", quant="hf")
    original = transformers.LlamaForCausalLM.from_pretrained(checkpoint)
    theirs = peft.PeftModel.from_pretrained(original, mine).merge_and_unload().state_dict()
    ours = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=2e-6, rtol=0, msg=name)
    assert merged.size_bytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert merged.kind == "Hugging Face folder in F32"


def test_a_folder_has_the_shards_and_files_of_its_base(checkpoint, tmp_path):
    (checkpoint / "README.md").write_text("# The base\n")
    (checkpoint / "generation_config.json").write_text('{"do_sample": true}')
    mine = saved(tmp_path / "mine", make_adapter(open_base(checkpoint)))
    merge(checkpoint, [(mine, 0.5)], tmp_path / "out", quant="HF", options=MergeOptions(hf_dtype="BF16"))
    made = {file.name for file in (tmp_path / "out").iterdir()}
    assert made == ({file.name for file in checkpoint.iterdir()} - {"README.md"}) | {"edgelora.json"}
    base, merged = open_base(checkpoint), open_base(tmp_path / "out")
    assert (merged.quant, merged.source.config["dtype"]) == ("BF16", "bfloat16")
    assert [len(shard.tensors) for shard in merged.source.shards] == [
        len(shard.tensors) for shard in base.source.shards
    ]
    assert merged.template_source == base.template_source
    assert len(merged.lineage) == 1
    assert merged.lineage[0].endswith(":0.5")
    with pytest.raises(AdapterError, match="has been merged with an adapter"):
        merge(tmp_path / "out", [(mine, 1.0)], tmp_path / "twice.gguf")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        value.nbytes for name in set(index["weight_map"].values()) for value in load_bf16(tmp_path / "out" / name)
    )


def load_bf16(path: Path) -> list[torch.Tensor]:
    return list(safetensors.torch.load_file(path).values())


def test_what_cannot_become_a_folder_is_refused(tiny, checkpoint, tmp_path):
    mine = saved(tmp_path / "mine", make_adapter(open_base(tiny.path)))
    with pytest.raises(ExportError, match="a GGUF does not become a Hugging Face folder"):
        merge(tiny.path, [(mine, 1.0)], tmp_path / "out", quant="hf")
    with pytest.raises(ConfigError, match="--hf-dtype Q8_0"):
        merge(checkpoint, [(mine, 1.0)], tmp_path / "out", quant="hf", options=MergeOptions(hf_dtype="Q8_0"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"kept")
    with pytest.raises(OutputError, match="this is not a checkpoint"):
        merge(checkpoint, [(mine, 1.0)], tmp_path / "photos", quant="hf", overwrite=True)
    assert (tmp_path / "photos" / "one.jpg").read_bytes() == b"kept"
    assert not (tmp_path / "out").exists()


# -- what the file says -------------------------------------------------------------------------------------------


def test_a_merged_model_is_another_base(tiny, tmp_path):
    mine = saved(tmp_path / "mine", make_adapter(open_base(tiny.path)))
    write(tiny.path, [(mine, 1.0), (mine, 0.25)], tmp_path / "merged.gguf")
    assert [entry.rpartition(":")[2] for entry in open_base(tmp_path / "merged.gguf").lineage] == ["1", "0.25"]
    with pytest.raises(AdapterError, match="has been merged with an adapter"):
        export(tmp_path / "merged.gguf", mine, tmp_path / "a.gguf")


def plain(value: Value) -> list[object]:
    return list(np.atleast_1d(list(value.data) if value.item else value.data))


def test_metadata_tokenizer_and_template_travel_along(tiny, tmp_path):
    mine = saved(tmp_path / "mine", make_adapter(open_base(tiny.path)))
    write(tiny.path, [(mine, 1.0)], tmp_path / "merged.gguf")
    before, after = GGUFFile(tiny.path), GGUFFile(tmp_path / "merged.gguf")
    for key, value in before.metadata.items():
        if key != "general.file_type":
            found = after.metadata[key]
            assert (found.type, found.item, plain(found)) == (value.type, value.item, plain(value)), key


@pytest.mark.parametrize("quant", ["Q4_K_M", "F16"])
def test_a_merge_says_what_it_is_and_where_it_comes_from(tiny, checkpoint, tmp_path, quant):
    mine = saved(tmp_path / "mine", make_adapter(open_base(tiny.path)))
    for base, name in ((tiny.path, "tiny-F32"), (checkpoint, "Checkpoint")):
        write(base, [(mine, 1.0)], tmp_path / "merged.gguf", quant)
        file = GGUFFile(tmp_path / "merged.gguf")
        assert file.get("general.name", str) == f"{name} + mine"
        assert file.get("general.base_model.count", int) == 1
        assert file.get("general.base_model.0.name", str) == name
        assert str(file.get("general.quantized_by", str)).startswith("edgelora ") == (quant != "F16")  # "None" without
        assert len(json.loads(file.get(LINEAGE_KEY, str))) == 1
        assert read_contract(file.get(CONTRACT_KEY, str), "merged").method == "lora"
        assert CERTIFICATE_KEY in file.metadata


@pytest.mark.parametrize("folder", [False, True], ids=["gguf", "folder"])
def test_an_adapter_at_scale_0_leaves_no_trace(tiny, checkpoint, tmp_path, folder):
    base = checkpoint if folder else tiny.path
    mine = saved(tmp_path / "mine", make_adapter(open_base(base)))
    other = make_adapter(open_base(base), seed=1)
    other = replace(other, contract=other.contract.model_copy(update={"method": "another"}))
    named, out = [(saved(tmp_path / "other", other), 0.0), (mine, 1.0)], tmp_path / "out.gguf"
    merge(base, named, out, quant="hf" if folder else "F16")
    merged = open_base(out)
    assert len(merged.lineage) == 1
    stated = (out / "edgelora.json").read_text() if folder else merged.file.get(CONTRACT_KEY, str)
    assert read_contract(stated, "merged").method == "lora"
    if not folder:
        assert merged.file.get("general.name", str) == "tiny-F32 + mine"
        merge(base, named[:1], tmp_path / "same.gguf", quant="F32")
        assert open_base(tmp_path / "same.gguf").identity == open_base(base).identity
        assert CONTRACT_KEY not in GGUFFile(tmp_path / "same.gguf").metadata


def test_an_empty_array_is_left_out(tmp_path):
    kinds = gguf.GGUFValueType
    stranger = SimpleNamespace(
        metadata={"a": Value(kinds.ARRAY, np.empty(0), kinds.INT32), "b": Value(kinds.UINT32, 7)}
    )
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    copy_metadata(stranger, writer)
    assert list(writer.kv_data[0]) == ["general.architecture", "b"]


# -- what can be lost ---------------------------------------------------------------------------------------------


def notes_of(base: Path, mine: Path, out: Path, quant: str) -> list[str]:
    return [note for note in write(base, [(mine, 1.0)], out, quant) if "snap back" in note]


def test_merging_into_the_very_weights_it_was_trained_over_is_told(make_tiny, tiny, tmp_path):
    """Into that file, and into its dequantized form; not where results are fine, nor over the original."""
    q4, out = make_tiny(Type.Q4_0), tmp_path / "out.gguf"
    mine = saved(tmp_path / "mine", make_adapter(open_base(q4.path)))
    write_base_gguf(tmp_path / "dequantized.gguf", open_base(q4.path), "F16")
    for base in (q4.path, tmp_path / "dequantized.gguf"):
        (note,) = notes_of(base, mine, out, "Q4_0")
        assert "mine was trained over tiny-Q4_0.gguf (Q4_0), and these are that file's weights" in note
        assert "merge it into the 16-bit original" in note
        assert f"export {base} ADAPTER" in note
        assert notes_of(base, mine, out, "Q8_0") == notes_of(base, mine, out, "F16") == []
        assert [note for note in write(base, [(mine, 0.0)], out, "Q4_0") if "snap back" in note] == []
    assert notes_of(tiny.path, mine, out, "Q4_0") == []


def test_what_no_adapter_file_holds_is_not_advised_to_run_live(make_tiny, tmp_path):
    q4 = make_tiny(Type.Q4_0)
    base = open_base(q4.path)
    for method, live in (("dora", True), ("lorma_pi", False)):
        Stir(rank=2, alpha=2.0, by=0.1).on(base, method, folder=tmp_path / method)
        _, parts = open_parts(q4.path, [(tmp_path / method, 1.0)], allow_unverified=True)
        for quant in ("Q4_0", "F16"):
            types = dict.fromkeys(base.file.tensors, Type[quant])
            (note,) = snap_back_notes(base, parts, types)
            assert (" live over " in note) == live
            assert "erge it into the 16-bit original" in note


def test_the_note_is_about_something_real(make_tiny, tiny, tmp_path):
    """Of a small change a merge into the original keeps all on average, one into the file itself little."""
    q4, kept = make_tiny(Type.Q4_0), {}
    adapter = make_adapter(open_base(q4.path), strength=0.002)
    mine = saved(tmp_path / "mine", adapter)
    for name, path in (("file", q4.path), ("original", tiny.path)):
        for scale in (0.0, 1.0):
            write(path, [(mine, scale)], tmp_path / f"{name}-{scale:g}.gguf", "Q4_0")
        with_it, without = (open_base(tmp_path / f"{name}-{scale}.gguf") for scale in (1, 0))
        along = across = 0.0
        for module, pair in adapter.pairs().items():
            change = pair.b @ pair.a
            moved = (
                with_it.tensors.matrix(f"{module}.weight").floats()
                - without.tensors.matrix(f"{module}.weight").floats()
            )
            along, across = along + float((moved * change).sum()), across + float((change * change).sum())
        kept[name] = along / across
    assert kept["original"] == pytest.approx(1, abs=0.1)
    assert kept["file"] < 0.5


def test_another_quantized_base_is_told_in_general(make_tiny, tiny, tmp_path):
    mine = saved(tmp_path / "mine", make_adapter(open_base(tiny.path)))
    (note,) = notes_of(make_tiny(Type.Q4_0).path, mine, tmp_path / "out.gguf", "Q4_0")
    assert note.startswith("the base is Q4_0 already")


@pytest.mark.parametrize(("quant", "scale"), [("F16", 1e9), ("Q4_0", 1e9), ("Q4_K_M", 1e9), ("BF16", 1e40)])
def test_a_weight_that_does_not_fit_is_named(tiny, tmp_path, quant, scale):
    mine = saved(tmp_path / "mine", make_adapter(open_base(tiny.path)))
    with pytest.raises(ExportError) as fault:
        merge(tiny.path, [(mine, scale)], tmp_path / "merged.gguf", quant=quant)
    assert fault.value.what.startswith("blk.0.")
    assert "a merged weight" in fault.value.what
    assert "smaller scale" in fault.value.fix
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_type_that_needs_importance_is_refused_without(tiny, tmp_path):
    mine = saved(tmp_path / "mine", make_adapter(open_base(tiny.path)))
    with pytest.raises(ExportError, match="importance") as fault:
        merge(tiny.path, [(mine, 1.0)], tmp_path / "out.gguf", quant="IQ2_XS")
    assert "edgelora imatrix" in fault.value.fix
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


# -- what it takes ------------------------------------------------------------------------------------------------


def test_no_tensor_is_ever_whole_in_memory(tmp_path, monkeypatch):
    """Of a bfloat16 checkpoint whose embedding is 4 MiB: no more than its own size, whatever it becomes."""
    monkeypatch.setattr("converters.base_to_gguf.ELEMENTS_AT_ONCE", 1 << 15)
    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=2, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    base = open_base(tmp_path / "bf16")
    part = Part(make_unnamed(base), 1.0, "0", "mine")
    recipe = Recipe(base, [part], float_types(base, Type.F32), gguf.LlamaFileType.ALL_F32)
    monkeypatch.setattr("converters.merge.describe", lambda *_: None)  # no tokenizer here
    tracemalloc.start()
    try:
        write_merged(tmp_path / "out.gguf", recipe)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out.gguf").stat().st_size > 4 * 8192 * 256
    assert peak <= 8192 * 256 * 2


def test_of_an_adapter_one_module_is_in_memory_at_a_time(tiny, tmp_path):
    """Whatever its rank: read, checked, and gone through as a merge does, with a scale that makes a copy of each B."""
    base = open_base(tiny.path)
    one = make_unnamed(base)
    tensors = {
        name: {part: np.tile(x, (512, 1) if part == "lora_A" else (1, 512)) for part, x in parts.items()}
        for name, parts in one.tensors.items()
    }
    write_adapter(tmp_path / "large", Adapter({**one.config, "r": 1024}, tensors))
    largest = max(sum(x.nbytes for x in parts.values()) for parts in tensors.values())
    tracemalloc.start()
    try:
        pairs = gguf_changes(read_adapter(tmp_path / "large", base.layers), base)
        found = {name: pairs[name].pair.b.shape for name in pairs}
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == len(tensors) == 14
    assert peak < 3 * largest


def make_unnamed(base) -> Adapter:
    """A small adapter without a contract."""
    tensors = {
        name: {"lora_A": np.ones((2, d_in), np.float32), "lora_B": np.ones((d_out, 2), np.float32)}
        for name, (d_out, d_in) in base.linears.items()
    }
    return Adapter({"peft_type": "LORA", "r": 2, "lora_alpha": 2.0}, tensors)


RESIDENT = """
import resource, sys
from pathlib import Path
from edgelora.pipeline.merge import MergeOptions, Wanted, open_parts, write_gguf

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

base, adapter, out = map(Path, sys.argv[1:])
seen = []
opened, parts = open_parts(base, [(adapter, 1.0)], allow_unverified=False)
wanted = Wanted.read("BF16", MergeOptions())
write_gguf(out, opened, parts, wanted, lambda p: seen.append(resident("RssFile")))
print(max(seen) - min(seen), "torch" in sys.modules)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc what of a process is mapped files")
def test_mapped_pages_are_let_go_and_torch_is_not_imported(tmp_path, vocabulary, write_tokenizer):
    """40 MB of weights in tensors of 2 MB: what was read of the file does not stay in memory."""
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=1024, num_attention_heads=4, num_key_value_heads=4,
        num_hidden_layers=3, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "wide")
    write_tokenizer(tmp_path / "wide", vocabulary, None)
    mine = saved(tmp_path / "mine", make_adapter(open_base(tmp_path / "wide")))
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, tmp_path / "wide", mine, tmp_path / "out.gguf"], cwd=ROOT,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    grown, with_torch = done.stdout.split()
    assert int(grown) < 8e6
    assert with_torch == "False"


# -- the command --------------------------------------------------------------------------------------------------


def test_the_command_writes_any_type(tiny, tmp_path, capfd):
    mine, out = saved(tmp_path / "mine", make_adapter(open_base(tiny.path))), tmp_path / "out.gguf"
    words = ["merge", str(tiny.path), "--adapter", f"{mine}:0.5", "--to", "q4_k_m", "--out", str(out), "--json"]
    assert run(words) == 0
    said = json.loads(capfd.readouterr().out)
    assert (said["out"], said["type"], said["size_bytes"]) == (str(out), "Q4_K_M", out.stat().st_size)
    assert open_base(out).lineage[0].endswith(":0.5")
    assert run(words) == OutputError.exit_code
    assert "exists already" in capfd.readouterr().err


def test_adapters_may_follow_the_base(tiny, tmp_path, capfd):
    """`merge BASE ADAPTER…`, as export has it; with --adapter in the order of the words, positional ones first."""
    base, out = open_base(tiny.path), tmp_path / "out.gguf"
    one, two, three = (str(saved(tmp_path / str(i), make_adapter(base, seed=i))) for i in range(3))
    assert run(["merge", str(tiny.path), f"{one}:0.5", two, "--adapter", f"{three}:-1", "--out", str(out)]) == 0
    assert [entry.rpartition(":")[2] for entry in open_base(out).lineage] == ["0.5", "1", "-1"]
    capfd.readouterr()
    assert run(["merge", str(tiny.path), "--out", str(tmp_path / "none.gguf"), "--for", "ollama"]) == 2
    assert "Invalid value for ADAPTER: name at least one, behind the base" in capfd.readouterr().err


def test_numbers_of_a_folder_are_refused_for_a_file(tiny, tmp_path, capfd):
    mine = saved(tmp_path / "mine", make_adapter(open_base(tiny.path)))
    for words in (["--to", "Q4_0"], []):
        out = ["--out", str(tmp_path / "x.gguf"), "--hf-dtype", "f16"]
        assert run(["merge", str(tiny.path), str(mine), *words, *out]) == ConfigError.exit_code
        said = capfd.readouterr().err
        assert said.startswith("error: --hf-dtype F16, and what is written is no Hugging Face folder")
        assert "fix: leave it out, or pass --to hf" in said
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--to", "Q9_K"], "error: Q9_K: no such quantization type"),
        (["--to", "COPY"], "error: --to COPY"),
        (["--plan", "none.toml"], "error: none.toml: not a usable plan"),
        (["--to", "Q4_0", "--imatrix", "none.gguf"], "error: none.gguf: no such file"),
        (["--imatrix", "none.gguf"], "error: --imatrix none.gguf with F16"),
    ],
)
def test_what_cannot_be_is_refused(tiny, tmp_path, capfd, words, what):
    mine = saved(tmp_path / "mine", make_adapter(open_base(tiny.path)))
    assert run(["merge", str(tiny.path), "--adapter", str(mine), "--out", str(tmp_path / "x.gguf"), *words]) == 1
    said = capfd.readouterr().err
    assert said.startswith(what)
    assert all(line in said for line in ("  why: ", "  fix: "))
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_the_adapter_is_left_as_it_was(tiny, tmp_path):
    base = open_base(tiny.path)
    mine = saved(tmp_path / "mine", make_adapter(base))
    before = {file.name: file.read_bytes() for file in mine.iterdir()}
    write(tiny.path, [(mine, 1.0)], tmp_path / "out.gguf", "Q8_0")
    assert {file.name: file.read_bytes() for file in mine.iterdir()} == before
    assert read_adapter(mine, base.layers).contract is not None
