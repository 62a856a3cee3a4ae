"""`edgelora inspect`: what is in a base or an adapter, as far as it can be read, and what can be done with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import TEMPLATE
from gguf.constants import GGMLQuantizationType as Type
from rich.cells import cell_len
from safetensors.numpy import load_file, save_file
from stirred import Stir

from converters.adapter_to_gguf import write_adapter_gguf
from converters.metadata import copy_metadata
from converters.quantize import write_quantized
from edgelora.base.model import open_base
from edgelora.cli import run
from edgelora.files.contract import CERTIFICATE_KEY, LINEAGE_KEY, Contract
from edgelora.files.gguf import GGUFFile
from edgelora.files.reserved import fill_reserved
from edgelora.peft.adapter import Adapter, write_adapter
from edgelora.peft.targets import Where
from edgelora.pipeline.inspect import inspect
from edgelora.pipeline.inspect_facts import shares, template_facts
from edgelora.pipeline.inspect_shape import DIMENSIONS
from edgelora.pipeline.quantize import QuantizeSettings, prepare, quantize

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj")
DATA = [{"name": "train.jsonl", "rows": 924, "weight": 1.0}, {"name": "more.jsonl", "rows": 7, "weight": 0.5}]
CERTIFICATE = {"passed": True, "kl_limit": 0.01, "adapter": {"kl_mean": 0.001, "same_top": 0.98, "n_tokens": 87}}


def an_adapter(path: Path, **config: object) -> Adapter:
    """Rank 4 on three linear layers of the base at `path`, with its contract."""
    base = open_base(path)
    contract = Contract(
        version="0", base=base.fingerprint, base_file=base.base_file, tokenizer_sha256=base.tokenizer.sha256,
        chat_template_sha256=base.template_sha256, eog_ids=base.tokenizer.eog_ids, method="lora", system="Be brief.",
        training={"epochs": 1.5, "rank": 4, "data": DATA, "choices": {"a": {}}},
        evaluation={"held_out_loss": 0.25}, versions={"edgelora": "0"}, certificate=CERTIFICATE,
    )  # fmt: skip
    draw = np.random.default_rng(0)
    tensors = {
        name: {
            "lora_A": draw.normal(size=(4, d_in)).astype(np.float32),
            "lora_B": draw.normal(size=(d_out, 4)).astype(np.float32),
        }
        for name, (d_out, d_in) in ((name, base.linears[name]) for name in MODULES)
    }
    return Adapter({"peft_type": "LORA", "r": 4, "lora_alpha": 8.0, **config}, tensors, contract)


@pytest.fixture
def peft(tiny, tmp_path) -> Path:
    write_adapter(tmp_path / "adapter", an_adapter(tiny.path))
    return tmp_path / "adapter"


@pytest.fixture
def checkpoint(shared_data, tmp_path) -> Path:
    """stories260K as a Hugging Face folder, without the GGUF beside it."""
    (tmp_path / "stories").mkdir()
    for file in (shared_data / "models" / "stories260K").iterdir():
        if file.suffix != ".gguf":
            shutil.copyfile(file, tmp_path / "stories" / file.name)
    return tmp_path / "stories"


def edited(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def copied(source: Path, out: Path, *, leave_out: tuple[str, ...] = (), **keys: str) -> Path:
    """A GGUF with the same tensors and other texts in its metadata."""
    file = GGUFFile(source)
    writer = gguf.GGUFWriter(out, file.architecture)
    names = {name.replace("__", "."): text for name, text in keys.items()}
    copy_metadata(file, writer, leave_out=(*leave_out, *names))
    for name, text in names.items():
        writer.add_string(name, text)
    for name, info in file.tensors.items():
        writer.add_tensor(name, file.rows(name).view(np.float32).reshape(info.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def printed(capsys: pytest.CaptureFixture[str], path: Path) -> str:
    assert run(["inspect", str(path)]) == 0
    return capsys.readouterr().out


# -- bases --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0, Type.Q4_K])
def test_weights_are_counted_as_gguf_py_counts_them(make_tiny, kind):
    path = make_tiny(kind).path
    weights = inspect(path).weights
    tensors = gguf.GGUFReader(path).tensors
    assert weights.size_bytes == path.stat().st_size
    assert weights.parameters == sum(int(t.n_elements) for t in tensors)
    assert weights.bits_per_weight == 8 * sum(int(t.n_bytes) for t in tensors) / weights.parameters
    assert {share.type: share.tensors for share in weights.types} == {
        name: sum(t.tensor_type.name == name for t in tensors) for name in {t.tensor_type.name for t in tensors}
    }
    assert [share.fell_back for share in weights.types] == [{}] * len(weights.types)
    assert weights.quant == open_base(path).quant


def test_the_shape_is_the_configs(tiny):
    facts = inspect(tiny.path)
    assert (facts.kind, facts.fault, facts.shape.model_type, facts.shape.gguf_architecture) == (
        "GGUF", None, "llama", "llama",
    )  # fmt: skip
    assert facts.shape.dimensions == {k: v for k in DIMENSIONS if (v := getattr(tiny.config, k))}
    assert facts.shape.rope == {"theta": 10000.0, "dim": 64}
    assert (facts.shape.context_in_llama_cpp, facts.shape.context_reason) == (512, None)
    assert facts.linears == dict.fromkeys(
        [name.removeprefix("model.layers.0.") for name in tiny.linears if ".0." in name], 2
    )


def test_sliding_layers_rotate_by_a_theta_of_their_own(tiny, monkeypatch, capsys):
    base = open_base(tiny.path)
    local = replace(base.config, rope_local=replace(base.config.rope, theta=5e5))
    monkeypatch.setattr("edgelora.pipeline.inspect.open_base", lambda _: replace(base, config=local))
    assert inspect(tiny.path).shape.rope == {"theta": 10000.0, "dim": 64, "local_theta": 5e5}
    assert "theta 10,000, dim 64, local theta 500,000" in printed(capsys, tiny.path)


def test_tensors_that_fell_back_are_told(shared_data, tmp_path, capsys):
    """Rows of 64 hold no blocks of 256, rows of 172 none of 32 either."""
    quantize(shared_data / "models" / "stories260K" / "stories260K-f32.gguf", tmp_path / "k.gguf", "Q4_K_M")
    found = {share.type: share.fell_back for share in inspect(tmp_path / "k.gguf").weights.types}
    assert found == {"Q5_0": {64: 29}, "Q8_0": {64: 3}, "F16": {172: 5}, "F32": {}}
    assert "fell back (64 columns)" in printed(capsys, tmp_path / "k.gguf")


def test_shares_of_narrow_types_are_not_fallbacks():
    parts = [("Q5_0", (4, 64), 100), ("F32", (4, 64), 10), ("Q5_0", (4, 512), 100), ("Q5_0", (64,), 100)]
    assert shares(parts)[0].fell_back == {}
    fell_back = {share.type: share.fell_back for share in shares(parts, wide=True)}
    assert fell_back == {"Q5_0": {64: 1}, "F32": {}}


def test_tokenizer_and_template(tiny):
    facts = inspect(tiny.path)
    assert facts.tokenizer.special["bos"] == (1, "<|im_start|>")
    assert facts.tokenizer.ends == [(0, "<|endoftext|>"), (2, "<|im_end|>")]
    assert (facts.tokenizer.model, facts.tokenizer.pre, facts.tokenizer.size) == ("gpt2", "smollm", 512)
    assert (facts.tokenizer.add_bos, facts.tokenizer.add_eos) == (False, False)
    assert facts.template.sha256 == open_base(tiny.path).template_sha256
    assert facts.template.characters == len(TEMPLATE)
    assert facts.template.takes_system
    assert facts.template.sample.startswith("<|im_start|>system\nAnswer briefly.<|im_end|>\n<|im_start|>user\nHi!<|im")
    assert facts.template.sample.endswith("<|im_start|>assistant\n5<|im_end|>\n")


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE


@pytest.mark.parametrize(
    ("source", "begins", "fault"),
    [
        (TEMPLATE, "<|im_start|>system\nAnswer", None),
        (NO_SYSTEM, "<|im_start|>user\nHi!", None),
        (TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"), "<|im", None),
        ("{{ raise_exception('never') }}", None, "the chat template refused a conversation: never"),
        ("{% for %}", None, "the chat template does not parse: "),
        ("{{ strftime_now('%Y') }}{{ messages[0].content }}", "2", None),
    ],
    ids=["system", "refuses system", "drops system", "refuses all", "does not parse", "date"],
)
def test_a_template_is_tried(source, begins, fault):
    found = template_facts(lambda: source, None)
    assert (found.sample or "").startswith(begins or "")
    assert (found.sample is None) == (begins is None)
    assert (found.fault or "").startswith(fault or "")
    assert (found.fault is None) == (fault is None)
    assert found.takes_system == (found.sample is not None and "Answer briefly." in found.sample)
    assert found.tells_the_date == ("strftime" in source and fault is None)


def test_a_base_that_trains_and_runs(tiny, make_tiny):
    facts = inspect(tiny.path)
    assert (facts.train.answer, facts.run.answer) == ("yes", "yes")
    assert facts.origin.fingerprint == open_base(tiny.path).fingerprint.short
    mute = inspect(make_tiny(template=None).path)
    assert (mute.template.sha256, mute.template.fault) == (None, None)
    assert mute.train.answer == "yes"
    assert "--chat-template" in mute.train.why


def test_a_broken_template_cannot_be_trained(make_tiny):
    facts = inspect(make_tiny(template="{% for %}").path)
    assert (facts.train.answer, facts.run.answer) == ("no", "yes")
    assert "does not parse" in facts.train.why


def test_a_checkpoint(checkpoint):
    facts = inspect(checkpoint)
    assert (facts.kind, facts.name, facts.weights.quant, facts.weights.files) == ("checkpoint", "stories", "F32", 1)
    assert facts.weights.parameters == sum(v.size for v in load_file(checkpoint / "model.safetensors").values())
    assert (facts.train.answer, facts.run.answer) == ("yes", "convert first")
    assert facts.origin.fingerprint == open_base(checkpoint).fingerprint.short


def test_the_copy_of_a_tied_head_is_no_parameter(checkpoint):
    before = inspect(checkpoint).weights.parameters
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, checkpoint / "model.safetensors")
    assert inspect(checkpoint).weights.parameters == before


def test_a_shorter_context_has_its_reason(checkpoint, capsys):
    edited(checkpoint / "config.json", model_type="mistral", sliding_window=128)
    shape = inspect(checkpoint).shape
    assert (shape.context_in_llama_cpp, shape.sliding_layers) == (128, 5)
    assert "sliding window" in shape.context_reason
    shown = printed(capsys, checkpoint)
    assert "512 tokens" in shown
    assert "128 in llama.cpp: " in shown


def test_what_llama_cpp_computes_otherwise_is_refused_there(checkpoint):
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}
    edited(checkpoint / "config.json", rope_scaling=scaling)
    assert inspect(checkpoint).run.answer == "convert first"
    assert inspect(checkpoint).shape.rope["scaling"] == "yarn"
    edited(checkpoint / "config.json", rope_scaling={**scaling, "beta_fast": 16.0})
    facts = inspect(checkpoint)
    assert (facts.train.answer, facts.run.answer) == ("yes", "no")
    assert "llama.cpp would compute otherwise" in facts.run.why


# -- what cannot be opened as a base ------------------------------------------------------------------------------


def test_an_unknown_architecture_is_described_all_the_same(tiny, tmp_path, capsys):
    stranger = tmp_path / "stranger.gguf"
    writer = gguf.GGUFWriter(stranger, "mamba")
    copy_metadata(GGUFFile(tiny.path), writer)
    writer.add_block_count(3)
    writer.add_embedding_length(256)
    writer.add_tensor("token_embd.weight", np.zeros((512, 256), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    facts = inspect(stranger)
    assert "a model of the architecture mamba" in facts.fault
    assert (facts.shape.model_type, facts.shape.gguf_architecture) == (None, "mamba")
    assert facts.shape.dimensions == {"num_hidden_layers": 3, "hidden_size": 256}
    assert facts.weights.parameters == 512 * 256
    assert facts.tokenizer.size == 512
    assert facts.template.sample is not None
    assert (facts.train.answer, facts.run.answer, facts.origin.fingerprint) == ("no", "no", None)
    shown = printed(capsys, stranger)
    assert "✗ no: see above" in shown


def test_an_unknown_checkpoint_is_described_all_the_same(checkpoint):
    edited(checkpoint / "config.json", model_type="mamba2")
    facts = inspect(checkpoint)
    assert "a model of the architecture mamba2" in facts.fault
    assert (facts.shape.model_type, facts.shape.dimensions["num_hidden_layers"]) == ("mamba2", 5)
    assert (facts.tokenizer.size, facts.tokenizer.fault) == (512, None)
    assert facts.train.answer == facts.run.answer == "no"


def test_an_unknown_tokenizer_is_named(tiny, tmp_path):
    facts = inspect(copied(tiny.path, tmp_path / "odd.gguf", tokenizer__ggml__pre="never-heard-of"))
    assert facts.fault is None
    assert (facts.tokenizer.pre, facts.tokenizer.size) == ("never-heard-of", 512)
    assert "never-heard-of" in facts.tokenizer.fault
    assert facts.template.sample is not None
    assert (facts.train.answer, facts.run.answer, facts.origin.fingerprint) == ("no", "no", None)


def test_a_key_of_a_wrong_type_is_a_fault_and_no_end(tiny, tmp_path):
    facts = inspect(copied(tiny.path, tmp_path / "odd.gguf", llama__block_count="two"))
    assert "metadata llama.block_count is a STRING" in facts.fault
    assert "num_hidden_layers" not in facts.shape.dimensions
    assert facts.shape.dimensions["hidden_size"] == 256


def test_weights_that_nobody_can_read_are_told(checkpoint):
    """A quantized checkpoint: integers in which nobody knows the weights."""
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].astype(np.int32)
    save_file(tensors, checkpoint / "model.safetensors")
    facts = inspect(checkpoint)
    assert "weights of type I32" in facts.fault
    assert (facts.weights.parameters, facts.weights.bits_per_weight) == (None, None)


# -- lineage and certificates -------------------------------------------------------------------------------------


def test_of_a_model_the_comparison_over_its_own_weights_is_shown(tiny, tmp_path, capsys):
    stated = {**CERTIFICATE, "fidelity": CERTIFICATE["adapter"], "loss": {**CERTIFICATE["adapter"], "kl_mean": 0.5}}
    del stated["adapter"]
    model = copied(tiny.path, tmp_path / "m.gguf", **{CERTIFICATE_KEY.replace(".", "__"): json.dumps(stated)})
    assert "passed, mean KL 0.001 (limit 0.01)" in " ".join(printed(capsys, model).split())


def test_the_certificate_of_the_source_is_not_taken_for_its_own(tiny, tmp_path, capsys):
    first, plain = quantize(tiny.path, tmp_path / "first.gguf", "F16").path, tmp_path / "plain.gguf"
    assert not inspect(first).origin.certificate_of_source
    asked = prepare(first, "Q4_0", QuantizeSettings(plain=True))
    write_quantized(asked.source, plain, asked.options, keys=asked.keys)
    assert inspect(plain).origin.certificate_of_source
    told = "none of its own: this is that of the file it was made from, which has other types"
    assert told in " ".join(printed(capsys, plain).split())
    assert told not in " ".join(printed(capsys, first).split())


def test_lineage_and_certificate_of_a_base(tiny, tmp_path, capsys):
    merged = copied(
        tiny.path, tmp_path / "merged.gguf",
        **{LINEAGE_KEY.replace(".", "__"): '["a", "b"]', CERTIFICATE_KEY.replace(".", "__"): json.dumps(CERTIFICATE)},
    )  # fmt: skip
    origin = inspect(merged).origin
    assert (origin.lineage, origin.certificate, origin.contract) == (["a", "b"], CERTIFICATE, None)
    shown = printed(capsys, merged)
    assert "2 merges in its weights" in shown
    claim = "certificate says of itself: passed, mean KL 0.001 (limit 0.01), same top 98.0%, on 87 tokens"
    assert claim in " ".join(shown.split())


@pytest.mark.parametrize("text", ["   ", "[1]", "{", '{"passed": "yes", "adapter": 7}', "[" * 100_000])
def test_a_certificate_is_what_somebody_wrote(tiny, tmp_path, capsys, text):
    odd = copied(tiny.path, tmp_path / "odd.gguf", **{CERTIFICATE_KEY.replace(".", "__"): text})
    assert ("not passed" in printed(capsys, odd)) == text.startswith('{"')


def test_a_tampered_lineage_is_a_fault(tiny, tmp_path):
    facts = inspect(copied(tiny.path, tmp_path / "odd.gguf", **{LINEAGE_KEY.replace(".", "__"): "7"}))
    assert f"{LINEAGE_KEY} is no list of texts" in facts.origin.faults[0]
    assert len(facts.origin.faults) == 1
    assert facts.train.answer == facts.run.answer == "no"


# -- adapters -----------------------------------------------------------------------------------------------------


def test_a_peft_adapter(peft, tiny, capsys):
    facts = inspect(peft)
    assert (facts.kind, facts.method, facts.base, facts.alpha) == ("PEFT adapter", "lora", tiny.path.name, 8.0)
    assert facts.ranks == {4: 3}
    assert facts.targets == {"q_proj": 2, "down_proj": 1}
    assert facts.parameters == sum(v.size for v in load_file(peft / "adapter_model.safetensors").values())
    assert facts.contract["base"]["fingerprint"] == open_base(tiny.path).fingerprint.short
    assert (facts.certificate, facts.faults) == (CERTIFICATE, [])
    shown = " ".join(printed(capsys, peft).split())
    for part in ("rank 4, alpha 8", "3 linear layers: 1 × down_proj; 2 × q_proj",
                 "924 rows of train.jsonl, 7 rows of more.jsonl", "epochs 1.5, rank 4",
                 "held out loss 0.25", "certificate says of itself: passed", "Be brief.",
                 f"export ✓ yes: over {tiny.path.name} (F32) or another quantization of it",
                 "chat ! export first: "):  # fmt: skip
        assert part in shown
    assert "✓ passed" not in shown
    assert (facts.export.answer, facts.merge, facts.chat.answer) == ("yes", facts.export, "export first")


def test_a_dora_leaves_as_a_patched_base(tiny, tmp_path, capsys):
    adapter = an_adapter(tiny.path, use_dora=True)
    for parts in adapter.tensors.values():
        parts["lora_magnitude_vector"] = np.ones(len(parts["lora_B"]), np.float32)
    write_adapter(tmp_path / "mine", adapter)
    facts = inspect(tmp_path / "mine")
    assert facts.faults == []
    assert (facts.export.answer, facts.merge.answer, facts.chat.answer) == ("yes", "yes", "export first")
    shown = " ".join(printed(capsys, tmp_path / "mine").split())
    assert "export ✓ yes: as a patched base, " in shown
    assert "chat ! export first: the base that is patched with it answers" in shown


DOORS = {
    "saved modules": ("lora", Where(modules_to_save=("norm", "lm_head")), "yes", "as a patched base, ", "yes"),
    "longlora": ("longlora", Where(), "yes", "as a patched base, ", "yes"),
    "full": ("full", Where(), "no", "a full fine-tuning changes whole weights: merge it into its base with", "yes"),
    "token_rows": ("token_rows", Where(token_indices=(3, 7)), "yes", "if that has a head of its own", "yes"),
    "alora": ("alora", Where(alora_invocation_tokens=(4,)), "yes", "over the base it was trained on", "no"),
}


@pytest.mark.parametrize(("method", "where", "export", "why", "merge"), DOORS.values(), ids=DOORS)
def test_without_its_base_the_doors_are_those_of_the_plan(tiny, tmp_path, method, where, export, why, merge):
    Stir(2, 2.0, by=0.2).on(open_base(tiny.path), method, where, tmp_path / "mine")
    facts = inspect(tmp_path / "mine")
    assert (facts.faults, facts.export.answer, facts.merge.answer) == ([], export, merge)
    assert facts.chat.answer == ("export first" if export == "yes" else "no")
    assert why in facts.export.why


def test_a_gguf_adapter(tiny, tmp_path, capsys):
    path = tmp_path / "a.gguf"
    write_adapter_gguf(path, an_adapter(tiny.path), open_base(tiny.path), "a")
    facts = inspect(path)
    assert (facts.kind, facts.architecture, facts.base, facts.alpha) == ("GGUF adapter", "llama", tiny.path.name, 4.0)
    assert (facts.ranks, facts.targets) == ({4: 3}, {"attn_q": 2, "ffn_down": 1})
    assert [(share.type, share.tensors) for share in facts.types] == [("F16", 6)]
    assert (facts.certificate, facts.faults) == (None, [])
    assert (facts.export.answer, facts.merge.answer, facts.chat.answer) == ("no", "no", "yes")
    assert f"over {tiny.path.name} (F32)" in facts.chat.why
    fill_reserved(path, CERTIFICATE_KEY, json.dumps(CERTIFICATE))
    assert inspect(path).certificate == CERTIFICATE
    assert inspect(tmp_path) == inspect(path)  # a folder with one GGUF in it
    assert "GGUF adapter for llama, lora" in printed(capsys, path)


def broken(folder: Path, change: str) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    first = next(name for name in tensors if name.endswith("lora_A.weight"))
    match change:
        case "half":
            del tensors[first]
        case "nan":
            tensors[first][0, 0] = np.nan
        case "rank":
            tensors[first] = tensors[first][:2].copy()
        case "flat":
            tensors[first] = tensors[first].reshape(-1)
        case "stranger":
            tensors["score.weight"] = tensors[first]
        case "dora":
            edited(folder / "adapter_config.json", use_dora=True)
        case "contract":
            edited(folder / "edgelora.json", base_file=None)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("half", "lora_A is missing"), ("nan", "it holds NaN or infinite values"), ("rank", "expected (256, 2)"),
        ("flat", "expected (r, "), ("stranger", "score.weight is no part of a plain LoRA"),
        ("dora", "lora_magnitude_vector is missing"),
        ("contract", "the contract cannot be read (base_file: "),
    ],
)  # fmt: skip
def test_a_faulty_peft_adapter_is_described_with_its_faults(peft, capsys, change, fault):
    broken(peft, change)
    facts = inspect(peft)
    assert fault in facts.faults[0]
    assert facts.targets == {"q_proj": 2, "down_proj": 1}
    assert (facts.contract is None) == (change == "contract")
    assert (facts.export.answer, facts.merge.answer, facts.chat.answer) == ("no", "no", "no")
    shown = printed(capsys, peft)
    assert "fault" in shown
    assert shown.count("✗ no: see above") == 3


def test_a_faulty_gguf_adapter_is_described_with_its_faults(tmp_path, capsys):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_type("adapter")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.full((4, 8), np.inf, np.float32))
    writer.add_tensor("blk.0.attn_q.weight.lora_b", np.zeros((8, 4), np.float32))
    writer.add_tensor("blk.1.attn_q.weight.lora_a", np.zeros((2, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    facts = inspect(tmp_path / "a.gguf")
    assert (facts.method, facts.alpha, facts.ranks, facts.contract) == ("unknown", None, {4: 1, 2: 1}, None)
    for part in ("adapter.type is missing", "adapter.lora.alpha is missing", "NaN or infinite", "its other half"):
        assert part in facts.faults[0]
    assert "rank 2 to 4" in " ".join(printed(capsys, tmp_path / "a.gguf").split())


def test_an_adapter_without_a_contract(peft, capsys):
    (peft / "edgelora.json").unlink()
    edited(peft / "adapter_config.json", base_model_name_or_path="some/base", use_rslora=True)
    facts = inspect(peft)
    assert (facts.contract, facts.base, facts.method, facts.faults) == (None, "some/base", "lora + rslora", [])
    shown = " ".join(printed(capsys, peft).split())
    assert "some/base, by its own word: it has no contract" in shown
    assert "merge ✓ yes: with --allow-unverified-base, " in shown


# -- neither ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("missing", "no such file"), ("empty", "no models in this folder"), ("text", "not a usable GGUF file"),
        ("two", "2 models in this folder"), ("pickles", "its weights are pickles"),
        ("lone", "not a usable safetensors file"), ("pickles/pytorch_model.bin", "this is a pickle"),
        ("old", "adapter_model.bin: this is a pickle"), ("old/adapter_config.json", "not a usable GGUF file"),
    ],
)  # fmt: skip
def test_anything_else_is_three_lines(tmp_path, capsys, name, what):
    for folder in ("empty", "two", "pickles", "lone", "old"):
        (tmp_path / folder).mkdir()
    (tmp_path / "text").write_text("not a model " * 10, encoding="utf-8")
    for file in ("two/a.gguf", "two/b.gguf", "pickles/pytorch_model.bin", "old/adapter_model.bin"):
        (tmp_path / file).write_bytes(b"")
    (tmp_path / "pickles" / "config.json").write_text("{}", encoding="utf-8")
    for folder in ("lone", "old"):
        (tmp_path / folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert run(["inspect", str(tmp_path / name)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    first, why, fix = shown.err.splitlines()
    assert what in first
    assert (why[:7], fix[:7]) == ("  why: ", "  fix: ")


# -- how it looks -------------------------------------------------------------------------------------------------


def test_it_fits_80_columns(tiny, peft, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for path in (tiny.path, peft):
        lines = printed(capsys, path).splitlines()
        assert max(map(cell_len, lines)) <= 80
        assert "" not in (lines[0].strip(), lines[-1].strip())


def test_an_ascii_locale_gets_escapes(tiny, peft):
    """Also for what stands in the file itself, and for --json."""
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "80"}
    for arguments in ([tiny.path], [peft], [peft, "--json"]):
        command = [sys.executable, "-m", "edgelora", "inspect", *arguments]
        done = subprocess.run(command, capture_output=True, env={**os.environ, **locale}, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.isascii()


def test_what_a_file_says_cannot_move_the_cursor(tiny, tmp_path, capsys):
    evil = "\x1b[2J\r\n\u202eevil"
    path = copied(tiny.path, tmp_path / "evil.gguf", general__name=evil,
                  tokenizer__chat_template="{{ messages[0].content }}\x1b[2J\r")  # fmt: skip
    shown = printed(capsys, path)
    assert all(c.isprintable() for c in shown.replace("\n", ""))
    assert r"\x1b[2J\r\n\u202eevil" in shown
    assert inspect(path).name == evil


def test_a_text_without_end_is_cut(tiny, tmp_path, capsys):
    path = copied(tiny.path, tmp_path / "long.gguf", general__name="x" * 100_000,
                  tokenizer__chat_template="{{ messages[0].content * 1000 }}")  # fmt: skip
    assert len(printed(capsys, path)) < 10_000


def test_a_long_sample_is_cut_short_with_a_word(make_tiny, capsys):
    path = make_tiny(template="{% for i in range(60) %}line {{ i }}\n{% endfor %}{{ messages[0].content }}").path
    shown = printed(capsys, path)
    assert "line 23" in shown
    assert "line 24" not in shown
    assert "37 more lines; --json prints all" in shown
    assert "line 59" in inspect(path).template.sample


def test_json_holds_everything(tiny, peft, capsys):
    for path in (tiny.path, peft):
        assert run(["inspect", str(path), "--json"]) == 0
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        assert json.loads(out) == json.loads(json.dumps(asdict(inspect(path))))


def test_inspecting_loads_neither_torch_nor_llama_cpp(tiny):
    code = (
        "import sys; from edgelora.cli import run; code = run(['inspect', sys.argv[1], '--json']);"
        "sys.exit(code or ' '.join({'torch', 'llama_cpp'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny.path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
