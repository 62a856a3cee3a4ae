"""A checkpoint becomes a GGUF: checked before it is named, streamed, and refused where it would run wrongly."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf.constants import GGMLQuantizationType, GGUFValueType, LlamaFileType
from safetensors.numpy import load_file, save_file
from test_base import edited

from converters.base_to_gguf import write_base_gguf
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.cli import run
from edgelora.config import TrainConfig
from edgelora.data.template import CHATML
from edgelora.errors import (
    AdapterError,
    BaseModelError,
    CertificateError,
    ConfigError,
    EdgeloraError,
    ExportError,
    OutputError,
)
from edgelora.files.contract import CERTIFICATE_KEY, differences
from edgelora.files.gguf import GGUFFile
from edgelora.pipeline.convert import convert
from edgelora.pipeline.export import export
from edgelora.pipeline.merge import merge
from edgelora.training.run import run_training
from runtime.chat import Chat, Settings
from runtime.engine import Engine
from runtime.service import EngineConfig

SIZES = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 512, "initializer_range": 1 / 16,
    "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def make_checkpoint(tmp_path_factory, vocabulary, write_tokenizer):
    """`make_checkpoint(template=…)`: a small Llama as transformers saves it, in shards of 200 kB."""

    def make(template: str | None = "{% for m in messages %}{{ m.content }}{% endfor %}") -> Path:
        folder = tmp_path_factory.mktemp("checkpoint")
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).float()
        model.save_pretrained(folder, max_shard_size="200KB")
        write_tokenizer(folder, vocabulary, template)
        return folder

    return make


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint) -> Path:
    return make_checkpoint()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_checkpoint_in_shards_becomes_a_file_that_says_what_was_checked(checkpoint, tmp_path, dtype):
    assert len(list(checkpoint.glob("*.safetensors"))) > 1
    out = tmp_path / "base.gguf"
    made = convert(checkpoint, out, dtype=dtype)
    assert made.size_bytes == out.stat().st_size
    file = GGUFFile(out)
    certificate = json.loads(file.get(CERTIFICATE_KEY, str))
    assert certificate["passed"]
    assert certificate["loss"]["kl_mean"] == pytest.approx(made.fidelity.kl_mean, abs=1e-8)
    assert file.get("general.file_type", int) == {
        "F32": LlamaFileType.ALL_F32, "F16": LlamaFileType.MOSTLY_F16, "BF16": LlamaFileType.MOSTLY_BF16
    }[dtype]  # fmt: skip
    kinds = {info.type.name for name, info in file.tensors.items() if len(info.shape) == 2}
    assert kinds == {dtype}
    assert {info.type.name for info in file.tensors.values() if len(info.shape) == 1} == {"F32"}


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K_M"])
def test_the_fingerprint_is_one_from_checkpoint_to_quantized_file(checkpoint, tmp_path, quant):
    from edgelora.pipeline.quantize import quantize

    convert(checkpoint, tmp_path / "f16.gguf")
    quantize(tmp_path / "f16.gguf", tmp_path / "small.gguf", quant)
    original = open_base(checkpoint).fingerprint
    for name in ("f16.gguf", "small.gguf"):
        found = open_base(tmp_path / name)
        assert differences(original, found.fingerprint, found.quant) == []
        assert found.fingerprint.short == original.short


def test_metadata_is_what_llama_cpps_own_converter_writes(checkpoint, tmp_path):
    write_base_gguf(tmp_path / "base.gguf", open_base(checkpoint), "F16")
    file = GGUFFile(tmp_path / "base.gguf")
    expected = {
        "general.architecture": "llama", "general.type": "model", "general.quantization_version": 2,
        "llama.block_count": 2, "llama.context_length": 512, "llama.embedding_length": 256,
        "llama.feed_forward_length": 512, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 64, "llama.vocab_size": 512, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    }  # fmt: skip
    assert {key: file.metadata[key].data for key in expected} == expected
    assert file.metadata["general.name"].data
    assert file.metadata["general.size_label"].data


def test_the_readme_of_a_checkpoint_travels_along(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n# Tiny\n", encoding="utf-8")
    write_base_gguf(tmp_path / "base.gguf", open_base(folder), "F16")
    assert GGUFFile(tmp_path / "base.gguf").get("general.license", str) == "apache-2.0"


@pytest.mark.parametrize(
    "card",
    [
        "---\nlicense: [a: b: c\n---\n", "---\nlicense: 2024-01-01\ntags: 7\n---\n", "---\nlicense: {a: 1}\n---\n",
        "---\nname: {a: b}\nlanguage: [[en]]\n---\n", b"---\nlicense: \xe9\n---\n", "---\n" * 300_000,
    ],
    ids=["broken", "a date", "a table", "lists of lists", "latin-1", "long"],
)  # fmt: skip
def test_a_strange_model_card_says_nothing(make_checkpoint, tmp_path, card):
    folder = make_checkpoint()
    (folder / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    write_base_gguf(tmp_path / "base.gguf", open_base(folder), "F16")
    file = GGUFFile(tmp_path / "base.gguf")
    assert file.get("general.name", str)
    assert isinstance(file.get("general.license", str, ""), str)


def test_a_gguf_keeps_what_it_says_of_itself(tiny, tmp_path):
    path = edited(tiny.path, tmp_path / "named.gguf", metadata={
        "general.name": (GGUFValueType.STRING, "Mine"), "general.license": (GGUFValueType.STRING, "mit"),
    })  # fmt: skip
    write_base_gguf(tmp_path / "base.gguf", open_base(path), "F16")
    file = GGUFFile(tmp_path / "base.gguf")
    assert (file.get("general.name", str), file.get("general.license", str)) == ("Mine", "mit")


def test_quantized_weights_are_said_to_gain_nothing(make_tiny, tmp_path):
    made = convert(make_tiny(GGMLQuantizationType.Q8_0).path, tmp_path / "f16.gguf")
    assert any("these weights were Q8_0" in note for note in made.notes)


def test_no_more_than_three_of_the_largest_tensor_are_in_memory(checkpoint, tmp_path):
    base = open_base(checkpoint)
    largest = 512 * 256 * 4
    write_base_gguf(tmp_path / "warm.gguf", base, "F16")  # vocabulary and imports
    tracemalloc.start()
    try:
        write_base_gguf(tmp_path / "base.gguf", base, "F16")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    metadata = 700_000  # the vocabulary's texts, as the writer wants them
    assert peak <= 3 * largest + metadata


@pytest.mark.parametrize("kind", ["Llama", "Mixtral"])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_memory_is_three_times_the_largest_stored_tensor(tmp_path, monkeypatch, kind, dtype):
    """Of a bfloat16 checkpoint: as F32 a tensor alone is twice its size, and a mixture's experts become one tensor."""
    monkeypatch.setattr("converters.base_to_gguf.ELEMENTS_AT_ONCE", 1 << 12)
    mixture = {"num_local_experts": 4} if kind == "Mixtral" else {}
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, "vocab_size": 8192, **mixture})
    getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    base = open_base(tmp_path / "bf16")
    monkeypatch.setattr("converters.base_to_gguf.write_metadata", lambda *_: None)  # no tokenizer here
    tracemalloc.start()
    try:
        write_base_gguf(tmp_path / "base.gguf", base, dtype)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= 3 * 8192 * 256 * 2


def test_opening_a_checkpoint_reads_headers_only(checkpoint):
    """Peak memory of opening is far below one tensor: a header of a few kB, not weights."""
    open_base(checkpoint)
    tracemalloc.start()
    try:
        base = open_base(checkpoint)
        _, opened = tracemalloc.get_traced_memory()
        build_decoder(base)
        _, built = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert opened < 300_000
    assert built < 512 * 256 * 4 + 300_000  # and of a decoder over stored weights, less than one tensor more


def test_a_wrong_order_of_rows_is_not_named(checkpoint, tmp_path, monkeypatch):
    """The control: the check that every conversion passes can fail, and then nothing stands at --out."""
    monkeypatch.setattr("converters.base_to_gguf.gguf_row_order", lambda *_: None)
    with pytest.raises(CertificateError, match="does not compute"):
        convert(checkpoint, tmp_path / "base.gguf")
    assert {p.name for p in tmp_path.iterdir()} == {"base.gguf.rejected", "base.gguf.rejected.certificate.json"}


def test_a_weight_beyond_f16_is_named(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    shard = next(
        s
        for s in folder.glob("*.safetensors")
        if "model.layers.1.mlp.up_proj.weight" in open_base(folder).tensors.shapes()
    )

    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if (name := "model.layers.1.mlp.up_proj.weight") in tensors:
            tensors[name][3, 5] = 1e6
            save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"blk\.1\.ffn_up\.weight: a weight does not fit into F16"):
        convert(folder, tmp_path / "base.gguf")
    assert list(tmp_path.iterdir()) == []
    write_base_gguf(tmp_path / "base.gguf", open_base(folder), "BF16")


def test_a_gguf_is_converted_too(tiny, tmp_path):
    convert(tiny.path, tmp_path / "again.gguf", dtype="F32")
    again, original = open_base(tmp_path / "again.gguf"), open_base(tiny.path)
    assert again.fingerprint == original.fingerprint
    assert again.identity.tokenizer_sha256 == original.identity.tokenizer_sha256
    for name in original.file.tensors:
        np.testing.assert_array_equal(again.file.rows(name), original.file.rows(name), err_msg=name)


# -- the chosen template ------------------------------------------------------------------------------------------


def test_a_base_without_template_gets_chatml_by_choice(make_checkpoint, tmp_path):
    folder = make_checkpoint(template=None)
    made = convert(folder, tmp_path / "mute.gguf")
    assert any("no chat template" in note for note in made.notes)
    with pytest.raises(BaseModelError, match="no chat template"):
        _ = open_base(tmp_path / "mute.gguf").template
    convert(folder, tmp_path / "chatty.gguf", template="chatml")
    assert "<|im_start|>" in (open_base(tmp_path / "chatty.gguf").own_template or "")


def test_a_template_from_a_file(make_checkpoint, tmp_path):
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    convert(make_checkpoint(template=None), tmp_path / "a.gguf", template=str(tmp_path / "mine.jinja"))
    assert (open_base(tmp_path / "a.gguf").own_template or "").endswith("<|im_end|>{% endfor %}")
    with pytest.raises(BaseModelError, match="cannot be read"):
        convert(make_checkpoint(template=None), tmp_path / "b.gguf", template=str(tmp_path / "none.jinja"))


def test_a_base_with_a_template_keeps_it(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="a chat template of its own"):
        convert(checkpoint, tmp_path / "a.gguf", template="chatml")


# -- the command --------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_checked_and_what_comes_next(checkpoint, tmp_path, capfd):
    out = tmp_path / "base.gguf"
    assert run(["convert", str(checkpoint), "--out", str(out), "--json"]) == 0
    said = capfd.readouterr()
    found = json.loads(said.out)
    assert found["out"] == str(out)
    assert found["fidelity"]["kl_mean"] < 1e-4
    assert "same top" in said.err
    assert "quantize" in said.err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--type", "Q4_K_M"], ConfigError),
        (["--chat-template", "chatml"], ConfigError),
    ],
)
def test_what_cannot_be_is_refused(checkpoint, tmp_path, arguments, error, capfd):
    assert run(["convert", str(checkpoint), "--out", str(tmp_path / "x.gguf"), *arguments]) == error.exit_code
    said = capfd.readouterr().err
    assert all(line in said for line in ("error:", "why:", "fix:"))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept(checkpoint, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"mine")
    with pytest.raises(OutputError):
        convert(checkpoint, tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_bytes() == b"mine"


def test_steps_that_need_a_gguf_say_so(checkpoint, tmp_path):
    with pytest.raises(EdgeloraError) as fault:
        merge(checkpoint, [(tmp_path, 1.0)], tmp_path / "x.gguf")
    assert "no adapter here" in fault.value.what
    with pytest.raises(BaseModelError, match=r"which llama\.cpp cannot run") as fault:
        _ = open_base(checkpoint).file
    assert "edgelora convert" in fault.value.fix


def test_an_adapter_trained_over_the_checkpoint_runs_over_its_gguf(make_checkpoint, tmp_path):
    """The whole way: train over the folder, convert it, and export the adapter over the file: it is the same base."""
    folder = make_checkpoint(template=CHATML)
    row = {"messages": [{"role": "user", "content": "lights"}, {"role": "assistant", "content": "on"}]}
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps(row) + "\n") * 8, encoding="utf-8")
    trained = run_training(TrainConfig(base=folder, data=rows, out=tmp_path / "mine", epochs=4, rank=4))
    assert trained.losses[-1] < trained.losses[0]
    convert(folder, tmp_path / "base.gguf")
    certificate = export(tmp_path / "base.gguf", tmp_path / "mine", tmp_path / "mine.gguf")
    assert certificate.passed
    other = make_checkpoint(template=CHATML + " ")
    convert(other, tmp_path / "other.gguf")
    with pytest.raises(AdapterError, match="the chat template is another one"):
        export(tmp_path / "other.gguf", tmp_path / "mine", tmp_path / "x.gguf")


def test_a_chosen_template_travels_with_the_adapter_and_into_what_is_merged(make_checkpoint, tmp_path):
    base = tmp_path / "mute.gguf"
    convert(make_checkpoint(template=None), base)
    row = {"messages": [{"role": "user", "content": "lights"}, {"role": "assistant", "content": "on"}]}
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps(row) + "\n") * 4, encoding="utf-8")
    config = TrainConfig(base=base, data=rows, out=tmp_path / "mine", epochs=1, rank=2)
    with pytest.raises(BaseModelError, match="no chat template"):
        run_training(config)
    run_training(config.model_copy(update={"chat_template": "chatml"}))
    assert export(base, tmp_path / "mine", tmp_path / "mine.gguf").passed
    merge(base, [(tmp_path / "mine", 1.0)], tmp_path / "merged.gguf")
    assert "<|im_start|>" in (open_base(tmp_path / "merged.gguf").own_template or "")
    with Engine.open(base, EngineConfig(context=256)) as engine:
        engine.load("mine", tmp_path / "mine.gguf")
        assert "".join(Chat(engine, Settings(max_tokens=3)).ask("lights")) is not None


def test_more_layers_than_tensors_are_refused_at_once(make_checkpoint, monkeypatch):
    """A config may claim two billion: their names alone would fill the memory before one of them was missed."""
    folder = make_checkpoint()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2_000_000}))
    monkeypatch.setattr("edgelora.base.header.tensor_shapes", lambda *_: pytest.fail("names were made for every layer"))
    with pytest.raises(BaseModelError, match="claims 2000000 layers"):
        open_base(folder)
