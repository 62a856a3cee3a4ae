"""Adapters and merges as GGUF: llama.cpp computes with them what torch computes."""

from __future__ import annotations

import json
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type
from safetensors.numpy import save_file

from converters.adapter_to_gguf import write_adapter_gguf
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.data.conversation import read_conversations
from edgelora.data.encode import Example, encode_conversation
from edgelora.errors import AdapterError, CertificateError, DataError, ExportError, OutputError
from edgelora.evaluate.fidelity import fidelity
from edgelora.files.contract import CERTIFICATE_KEY, FILE_NAME, BaseFile, Contract, sha256_file
from edgelora.files.gguf import GGUFFile
from edgelora.peft.adapter import CONFIG, TENSORS, Adapter, read_adapter, write_adapter
from edgelora.peft.inject import attach
from edgelora.peft.soft_prompt import SAVED
from edgelora.pipeline.export import ExportOptions, export, read_checked, read_checked_prompt
from edgelora.pipeline.said import within
from runtime.scorer import ScoringEngine

IDS = [[*range(3, 60)], [*range(100, 180)]]


def make_adapter(base, rank=4, alpha=8.0, seed=0, strength=0.05, **config) -> Adapter:
    """An adapter with random A and B on every linear layer; `config` overrides PEFT's settings."""
    draw = np.random.default_rng(seed)
    tensors = {
        name: {
            "lora_A": draw.normal(0, d_in**-0.5, (rank, d_in)).astype(np.float32),
            "lora_B": draw.normal(0, strength, (d_out, rank)).astype(np.float32),
        }
        for name, (d_out, d_in) in base.linears.items()
    }
    contract = Contract(
        version="test", base=base.fingerprint, base_file=BaseFile(name=base.path.name, quant=base.quant, sha256="0"),
        tokenizer_sha256=base.tokenizer.sha256, chat_template_sha256=base.template_sha256,
        eog_ids=base.tokenizer.eog_ids, method="lora",
    )  # fmt: skip
    return Adapter({"peft_type": "LORA", "r": rank, "lora_alpha": alpha, **config}, tensors, contract)


def torch_logits(base, adapter=None) -> np.ndarray:
    decoder = build_decoder(base)
    attach(decoder, adapter)
    return np.concatenate([decoder.logits(torch.tensor(ids)).numpy() for ids in IDS])


def llama_logits(path, adapter=None, scale=1.0) -> np.ndarray:
    with ScoringEngine(open_base(path), n_ctx=256, n_sequences=2, threads=2) as engine:
        if adapter is not None:
            engine.load("a", adapter)
            engine.use({"a": scale})
        return np.concatenate([engine.logits([ids], [list(range(len(ids)))]) for ids in IDS])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 32.0, "down_proj": 2.0}},
        {"rank": 3, "alpha": 1.0},
    ],
    ids=["lora", "rslora", "alpha_pattern", "odd rank"],
)
@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_llama_cpp_computes_the_adapter_as_torch_does(tiny, tmp_path, settings, dtype):
    base = open_base(tiny.path)
    adapter = make_adapter(base, **settings)
    write_adapter_gguf(tmp_path / "a.gguf", adapter, base, "a", dtype)
    ours, theirs = torch_logits(base, adapter), llama_logits(tiny.path, tmp_path / "a.gguf")
    found = fidelity([(ours, theirs)])
    assert found.kl_mean <= 1e-5
    assert found.worst_flip_nats <= 0.01
    assert fidelity([(torch_logits(base), theirs)]).kl_mean > 100 * found.kl_mean  # the adapter does something


def test_ranks_may_differ_from_tensor_to_tensor(tiny, tmp_path):
    base = open_base(tiny.path)
    four, two = make_adapter(base, rank=4), make_adapter(base, rank=2)
    tensors = {m: (four if "attn" in m else two).tensors[m] for m in four.tensors}
    adapter = Adapter(four.config, tensors, four.contract)
    write_adapter_gguf(tmp_path / "a.gguf", adapter, base, "a", "F32")
    assert GGUFFile(tmp_path / "a.gguf").get("adapter.lora.alpha", float) == 0  # "as it is"
    assert fidelity([(torch_logits(base, adapter), llama_logits(tiny.path, tmp_path / "a.gguf"))]).kl_mean <= 1e-5


def test_the_file_is_what_llama_cpp_documents(tiny, tmp_path):
    base = open_base(tiny.path)
    adapter = make_adapter(base, rank=4)
    write_adapter_gguf(tmp_path / "a.gguf", adapter, base, "mine", "F16")
    file = GGUFFile(tmp_path / "a.gguf")
    assert [file.metadata[k].data for k in ("general.type", "general.architecture", "adapter.type")] == [
        "adapter", "llama", "lora",
    ]  # fmt: skip
    assert file.metadata["adapter.lora.alpha"].type.name == "FLOAT32"
    assert file.metadata["adapter.lora.alpha"].data == 4.0  # α = r: llama.cpp's own factor becomes 1
    a, b = file.tensors["blk.0.attn_q.weight.lora_a"], file.tensors["blk.0.attn_q.weight.lora_b"]
    assert (a.shape, b.shape, a.type) == ((4, 256), (256, 4), Type.F16)
    wanted = adapter.pairs()["model.layers.0.mlp.up_proj"].b  # not permuted, scale 8/4 folded in
    np.testing.assert_array_equal(file.rows("blk.0.ffn_up.weight.lora_b").view(np.float16), wanted.astype(np.float16))


def test_a_wrong_rotary_permutation_cannot_pass(tiny, make_tiny, tmp_path, monkeypatch):
    """It is invisible in shapes: over a float base and over a quantized one only the certificate sees it."""
    monkeypatch.setattr("converters.adapter_to_gguf.gguf_row_order", lambda *_: None)
    for model in (tiny, make_tiny(Type.Q8_0)):
        base = open_base(model.path)
        write_adapter(tmp_path / model.path.stem, make_adapter(base, strength=0.3))
        out = tmp_path / f"{model.path.stem}.gguf"
        with pytest.raises(CertificateError) as error:
            export(model.path, tmp_path / model.path.stem, out)
        assert error.value.exit_code == 3
        assert not out.exists()
        aside = out.with_name(f"{out.name}.rejected")
        assert str(error.value).splitlines()[2].endswith(f"what was written is kept as {aside.name}")
        assert json.loads(GGUFFile(aside).get(CERTIFICATE_KEY, str))["passed"] is False
    ends = ("", ".gguf.rejected", ".gguf.rejected.certificate.json")
    assert {p.name for p in tmp_path.iterdir()} == {name + end for name in ("tiny-F32", "tiny-Q8_0") for end in ends}


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.Q8_0, Type.Q4_0, Type.Q4_K])
def test_export_certifies_and_signs(make_tiny, tmp_path, kind):
    model = make_tiny(kind)
    base = open_base(model.path)
    write_adapter(tmp_path / "mine", make_adapter(base))
    certificate = export(model.path, tmp_path / "mine", tmp_path / "mine.gguf")
    assert certificate.passed
    assert certificate.equal_ids == certificate.n_prompts == 8
    inside = json.loads(GGUFFile(tmp_path / "mine.gguf").get(CERTIFICATE_KEY, str))
    assert inside == certificate.as_dict()
    beside = json.loads((tmp_path / "mine.certificate.json").read_text(encoding="utf-8"))
    assert beside == {"files": {"mine.gguf": sha256_file(tmp_path / "mine.gguf")}, **inside}
    assert read_adapter(tmp_path / "mine", base.layers).contract.certificate == inside
    if kind in (Type.F32, Type.F16):
        assert certificate.adapter.kl_mean <= 1e-4


def test_export_compares_where_something_is_learned(tiny, tmp_path):
    """Rows whose answers have the weight 0 have nothing to compare; a file of nothing else is refused."""
    write_adapter(tmp_path / "mine", make_adapter(open_base(tiny.path)))
    learned = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    unlearned = {"messages": [learned["messages"][0], {**learned["messages"][1], "weight": 0}]}
    for name, rows in (("some", [unlearned, learned]), ("none", [unlearned])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    some, none = (ExportOptions(data=tmp_path / f"{name}.jsonl") for name in ("some", "none"))
    certificate = export(tiny.path, tmp_path / "mine", tmp_path / "mine.gguf", some)
    assert (certificate.passed, certificate.n_prompts) == (True, 1)
    with pytest.raises(DataError, match="no row has an answer to compare"):
        export(tiny.path, tmp_path / "mine", tmp_path / "other.gguf", none)
    assert not (tmp_path / "other.gguf").exists()


def test_a_row_beyond_the_context_is_compared_as_far_as_it_fits(tiny, tmp_path):
    base = open_base(tiny.path)
    write_adapter(tmp_path / "mine", make_adapter(base))
    long = [{"role": "user", "content": "lights " * base.context}, {"role": "assistant", "content": "off " * 40}]
    short = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = "".join(json.dumps({"messages": row}) + "\n" for row in (long, short))
    (file := tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    certificate = export(tiny.path, tmp_path / "mine", tmp_path / "mine.gguf", ExportOptions(data=file))
    assert certificate.passed
    assert certificate.equal_ids == certificate.n_prompts == 2
    answers = [encode_conversation(row, base.tokenizer, base.template) for row in read_conversations(file)]
    assert certificate.adapter.n_tokens == sum(row.n_loss_tokens for row in answers) > 40


@pytest.mark.parametrize(("n", "answer", "room", "ids", "compared"), [
    (9, [4, 5, 6, 7], 9, [*range(9)], [4, 5, 6, 7]),  # it fits: as it is
    (12, [8, 9, 10], 6, [0, 6, 7, 8, 9, 10], [8, 9, 10]),  # the first token, and up to the answer's end
    (9, [2, 3], 6, [*range(4)], [2, 3]),  # what follows the answer goes first
    (9, [*range(1, 9)], 4, [*range(3)], [1, 2]),  # of an answer that is longer itself, how it begins
    (9, [0, 5, 6, 7, 8], 2, [0, 5], [5]),  # before the first nothing comes
    (12, [2, 3, 7, 8, 9, 10], 4, [0, 6, 7, 8], [7, 8]),  # the last answer
    (12, [2, 3, 7], 8, [*range(8)], [2, 3, 7]),  # and the one before it
    (600, [*range(100, 500)], 600, [*range(356)], [*range(100, 356)]),  # no more than 256 are compared
])  # fmt: skip
def test_what_a_long_row_is_compared_on(n, answer, room, ids, compared):
    whole = Example(np.arange(n), np.isin(np.arange(n), answer))
    part = within(whole, room)
    assert part.input_ids.tolist() == ids
    assert part.input_ids[part.loss_mask].tolist() == compared


def test_export_refuses_another_base_and_an_existing_file(make_tiny, tiny, tmp_path):
    write_adapter(tmp_path / "mine", make_adapter(open_base(tiny.path)))
    other = make_tiny(seed=7)
    with pytest.raises(AdapterError, match="does not belong to"):
        export(other.path, tmp_path / "mine", tmp_path / "mine.gguf")
    (tmp_path / "there.gguf").write_bytes(b"kept")
    with pytest.raises(OutputError, match="exists already"):
        export(tiny.path, tmp_path / "mine", tmp_path / "there.gguf")
    assert (tmp_path / "there.gguf").read_bytes() == b"kept"


def test_another_base_and_what_does_not_fit_it_are_told_in_one_error(tiny, make_tiny, tmp_path):
    """So it is where the adapter is damaged too; where it names no base, what does not fit comes first."""
    adapter = make_adapter(open_base(tiny.path))
    q, up = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
    narrow = {**adapter.tensors[q], "lora_A": adapter.tensors[q]["lora_A"][:, :64]}
    adapter.tensors[up]["lora_B"][0, 0] = np.nan
    damaged = replace(adapter, tensors={**adapter.tensors, q: narrow})
    faults = f"{q}: lora_A is (4, 64), expected (r, 256); {up}: it holds NaN or infinite values"
    other = open_base(make_tiny(seed=7).path)
    write_adapter(tmp_path / "mine", damaged)
    with pytest.raises(AdapterError) as error:
        read_checked(tmp_path / "mine", other, allow_unverified=False)
    before, _, after = error.value.what.partition("the norm weights are others; ")
    assert before.startswith(f"{tmp_path / 'mine'} does not belong to {other.path}: ")
    assert after.endswith(f"; {faults}")
    assert error.value.fix.startswith("use tiny-F32.gguf or another quantization of it")
    write_adapter(tmp_path / "foreign", replace(damaged, contract=None))
    with pytest.raises(AdapterError) as error:
        read_checked(tmp_path / "foreign", other, allow_unverified=False)
    assert error.value.what == f"{tmp_path / 'foreign'}: {faults}; it does not say which base it belongs to"
    assert error.value.fix == "pass the base it was trained on, or train again on this one"
    with pytest.raises(AdapterError) as error:
        read_checked(tmp_path / "foreign", other, allow_unverified=True)
    assert error.value.what == f"{tmp_path / 'foreign'}: {faults}"


def test_so_it_is_of_what_stands_before_prompts(tiny, make_tiny, tmp_path):
    contract, other = make_adapter(open_base(tiny.path)).contract, open_base(make_tiny(seed=7).path)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))
    save_file({SAVED: np.ones((4, 64), np.float32)}, tmp_path / TENSORS)
    said = f"{SAVED} is (4, 64), expected (n, 256)"
    with pytest.raises(AdapterError) as error:
        read_checked_prompt(tmp_path, other, allow_unverified=False)
    assert error.value.what == f"{tmp_path}: {said}; it does not say which base it belongs to"
    (tmp_path / FILE_NAME).write_text(contract.model_dump_json())
    with pytest.raises(AdapterError) as error:
        read_checked_prompt(tmp_path, other, allow_unverified=False)
    assert error.value.what.startswith(f"{tmp_path} does not belong to {other.path}: ")
    assert error.value.what.endswith(f"; {said}")


def test_a_contract_that_cannot_be_read_is_one_of_the_faults(tiny, tmp_path):
    base = open_base(tiny.path)
    adapter = make_adapter(base)
    for name, tensors, first in (
        ("sound", adapter.tensors, "the contract cannot be read"),
        ("empty", {}, "it holds no LoRA tensors; the contract cannot be read"),
    ):
        write_adapter(tmp_path / name, replace(adapter, tensors=tensors))
        (tmp_path / name / FILE_NAME).write_text("{")
        with pytest.raises(AdapterError) as error:
            read_checked(tmp_path / name, base, allow_unverified=True)
        assert f": {first} (" in error.value.what


def test_an_adapter_without_a_contract_must_be_allowed(tiny, tmp_path):
    adapter = make_adapter(open_base(tiny.path))
    write_adapter(tmp_path / "foreign", Adapter(adapter.config, adapter.tensors))
    with pytest.raises(AdapterError, match="does not say which base"):
        export(tiny.path, tmp_path / "foreign", tmp_path / "f.gguf")
    assert export(tiny.path, tmp_path / "foreign", tmp_path / "f.gguf", ExportOptions(allow_unverified=True)).passed


def test_a_value_too_large_for_f16_is_named(tiny, tmp_path):
    base = open_base(tiny.path)
    adapter = make_adapter(base)
    adapter.tensors["model.layers.1.mlp.up_proj"]["lora_B"][0, 0] = 1e6
    with pytest.raises(ExportError, match=r"blk\.1\.ffn_up"):
        write_adapter_gguf(tmp_path / "a.gguf", adapter, base, "a", "F16")


def make_dora(base):
    """A DoRA whose rows are up to a fifth longer or shorter than the base's, each by its own factor."""
    adapter, decoder, draw = make_adapter(base, use_dora=True), build_decoder(base), np.random.default_rng(1)
    tensors = {}
    for name, parts in adapter.tensors.items():
        lengths = decoder.linears[name].weight.dequantize().norm(dim=1).numpy()
        factors = draw.uniform(0.8, 1.2, lengths.shape).astype(np.float32)
        tensors[name] = {**parts, "lora_magnitude_vector": lengths * factors}
    return Adapter(adapter.config, tensors, adapter.contract)


def test_exporting_a_dora_is_refused_before_anything_is_written(tiny, tmp_path):
    write_adapter(tmp_path / "mine", make_dora(open_base(tiny.path)))
    with pytest.raises(ExportError) as error:
        export(tiny.path, tmp_path / "mine", tmp_path / "mine.gguf")
    assert str(error.value).splitlines() == [
        "mine: a DoRA cannot be an adapter of llama.cpp",
        "  why: llama.cpp adds B A x to W x, and nothing else; a DoRA scales every row of the sum as well",
        "  fix: merge it into its base: `edgelora merge BASE --adapter FOLDER --to Q4_K_M --out FILE`",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_overwriting_never_replaces_a_folder_by_a_file(tiny, tmp_path):
    write_adapter(tmp_path / "mine", make_adapter(open_base(tiny.path)))
    with pytest.raises(OutputError, match="this is a folder"):
        export(tiny.path, tmp_path / "mine", tmp_path / "mine", ExportOptions(overwrite=True))
    assert (tmp_path / "mine" / "adapter_config.json").exists()


def test_gguf_py_reads_what_we_write(tiny, tmp_path):
    base = open_base(tiny.path)
    write_adapter_gguf(tmp_path / "a.gguf", make_adapter(base), base, "a")
    assert len(gguf.GGUFReader(tmp_path / "a.gguf").tensors) == 2 * 7 * 2
