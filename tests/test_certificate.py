"""A model file is held against what it was made from before it gets its name, and what fails is kept aside."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type
from test_export import make_adapter, make_dora

from converters.adapter_to_gguf import gguf_changes
from converters.metadata import copy_metadata, put
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.errors import BaseModelError, CertificateError, DataError, OutputError
from edgelora.evaluate.fidelity import Fidelity
from edgelora.evaluate.thresholds import THRESHOLDS, Limits, limits_of
from edgelora.files.certificate_keys import reserved
from edgelora.files.contract import CERTIFICATE_BYTES, CERTIFICATE_KEY, sha256_file
from edgelora.files.gguf import GGUFFile
from edgelora.files.reserved import reserve
from edgelora.files.unchanged import stamp
from edgelora.peft.adapter import write_adapter
from edgelora.peft.blend import blend
from edgelora.peft.inject import attach
from edgelora.pipeline.certificate import (
    ModelCertificate,
    Output,
    Reference,
    beside,
    certify_model,
    types_of,
    write_certified,
)
from edgelora.pipeline.check_rows import DEFAULT_CHECK, rows_to_check
from edgelora.pipeline.compare import Compared, compare
from edgelora.pipeline.said import Said
from edgelora.pipeline.torch_states import torch_states

IDS = torch.arange(3, 60)
ONE_OF_EACH = (Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_K, Type.Q2_K)


def same(kl: float = 0.0, top: float = 1.0, flip: float = 0.0) -> Fidelity:
    return Fidelity(100, kl, kl, kl, kl, top, flip)


def claimed(kind: Type = Type.Q4_0, **compared) -> ModelCertificate:
    equal = {"n_texts": 12, "equal_ids": 12, "n_rows": 8, "equal_text": 8, "equal_ends": 8}
    found = Compared(**{**equal, "fidelity": same(), "loss": same(), **compared})
    return ModelCertificate({kind.name: 3}, found, limits_of([kind]))


def held(draft: Path, base: Path, adapters: Sequence = ()) -> ModelCertificate:
    """The certificate as `certify_model` gives it, without a child process."""
    types = types_of(draft)
    found = compared_of(draft, Reference(base, tuple(adapters)))
    return ModelCertificate({kind.name: n for kind, n in types.items()}, found, limits_of(types))


def compared_of(draft: Path, reference: Reference, rows: Sequence | None = None) -> Compared:
    said = Said.read(reference.open()[0], open_base(draft).context, rows)
    states = torch_states((Reference(draft), reference), said.examples, lambda _: None)
    return compare(draft, reference, said, states, lambda _: None)


# -- the reference: several adapters at their scales --------------------------------------------------------------


def test_a_blend_is_the_merged_weights(tiny):
    """Oracle: W + Σ s ΔW written into the weights of a decoder; a DoRA's change is measured from the base's own W."""
    base = open_base(tiny.path)
    adapters = [(make_adapter(base, seed=1), 0.5), (make_dora(base), 1.0), (make_adapter(base, seed=2), -2.0)]
    blended, merged = build_decoder(base), build_decoder(base, "f32")
    blend(blended, adapters)
    plain = merged.logits(IDS).clone()
    for name, linear in merged.linears.items():
        w = linear.weight.dequantize().numpy().copy()
        change = sum(scale * adapter.pairs()[name].change(w) for adapter, scale in adapters)
        linear.weight.dequantize().add_(torch.from_numpy(change))
    torch.testing.assert_close(blended.logits(IDS), merged.logits(IDS), atol=2e-4, rtol=0)
    assert (blended.logits(IDS) - plain).abs().max() > 0.1


def test_a_blend_of_one_at_scale_1_is_that_adapter(tiny):
    base = open_base(tiny.path)
    one, other = build_decoder(base), build_decoder(base)
    attach(one, make_adapter(base))
    blend(other, [(make_adapter(base), 1.0)])
    torch.testing.assert_close(one.logits(IDS), other.logits(IDS), atol=2e-5, rtol=0)
    blend(other, [])
    torch.testing.assert_close(other.logits(IDS), build_decoder(base).logits(IDS), atol=0, rtol=0)


# -- what is compared ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ONE_OF_EACH, ids=lambda kind: kind.name)
def test_a_right_file_passes_far_from_its_limit(make_tiny, tiny, kind):
    found = held(make_tiny(kind).path, tiny.path)
    assert found.faults == []
    assert found.compared.fidelity.kl_mean < found.limits.kl_mean / 5
    assert found.compared.n_rows == len(DEFAULT_CHECK)
    assert found.compared.n_texts == found.compared.equal_ids > found.compared.n_rows


def test_the_loss_is_the_price_of_the_bits_and_no_fault(make_tiny, tiny):
    """Oracle: the torch decoders of both files, on the same tokens; at 2 bits most tops change and nothing is wrong."""
    price = [held(make_tiny(kind).path, tiny.path) for kind in (Type.F32, Type.Q8_0, Type.Q4_0, Type.Q2_K)]
    losses = [found.compared.loss.kl_mean for found in price]
    assert losses == sorted(losses)
    assert losses[-1] > 100 * price[-1].compared.fidelity.kl_mean
    assert all(found.faults == [] for found in price)


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0, Type.Q2_K], ids=lambda kind: kind.name)
def test_rows_read_in_another_order_than_llama_cpp_reads_them_fail(make_tiny, monkeypatch, kind):
    path = make_tiny(kind).path
    monkeypatch.setattr("edgelora.base.tensors.hf_row_order", lambda *_: None)
    faults = held(path, path).faults
    assert faults[0].startswith("llama.cpp against torch: mean KL")


def test_another_model_in_floats_fails_though_llama_cpp_computes_it_rightly(make_tiny, tiny):
    """A merge gone wrong is a sound model of other weights: only what it was made from can tell."""
    found = held(make_tiny(seed=7).path, tiny.path)
    assert [fault.partition(":")[0] for fault in found.faults] == ["against what it was made from"] * 2
    quantized = held(make_tiny(Type.Q8_0, seed=7).path, tiny.path)
    assert quantized.faults == []  # reported, and left to who reads it
    assert quantized.compared.loss.kl_mean > 0.1


def test_several_adapters_are_part_of_the_reference(tiny, tmp_path):
    base = open_base(tiny.path)
    adapters, named = [(make_adapter(base, seed=1), 1.0), (make_adapter(base, seed=2), -0.5)], []
    for number, (adapter, scale) in enumerate(adapters):
        write_adapter(tmp_path / str(number), adapter)
        named.append((tmp_path / str(number), scale))
    pairs = [(gguf_changes(adapter, base), scale) for adapter, scale in adapters]
    change = {name: sum(scale * of[name].pair.b @ of[name].pair.a for of, scale in pairs) for name in pairs[0][0]}
    edit(tiny.path, tmp_path / "merged.gguf", change=change)
    assert held(tmp_path / "merged.gguf", tiny.path, named).faults == []
    assert held(tmp_path / "merged.gguf", tiny.path, named[:1]).faults
    assert held(tmp_path / "merged.gguf", tiny.path).faults


def edit(source: Path, out: Path, keys: dict[str, object] | None = None, change: dict | None = None) -> None:
    """Copy a float model, with other values for `keys` and something added to the tensors of `change`."""
    file, writer = GGUFFile(source), gguf.GGUFWriter(out, "llama")
    copy_metadata(file, writer, leave_out=keys or {})
    for key, value in (keys or {}).items():
        writer.add_key_value(key, value, file.metadata[key].type, file.metadata[key].item)
    for name, info in file.tensors.items():
        values = file.rows(name).view(np.float32).reshape(info.shape)
        writer.add_tensor(name, values + (change or {}).get(name, np.float32(0)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


ANOTHER_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("template", [ANOTHER_TEMPLATE, "{% for %}"], ids=["another", "broken"])
def test_another_template_in_the_file_fails(tiny, tmp_path, template):
    edit(tiny.path, tmp_path / "other.gguf", {"tokenizer.chat_template": template})
    assert held(tmp_path / "other.gguf", tiny.path).faults == ["8 of 8 rows are rendered otherwise by its template"]


def test_a_turn_that_does_not_end_in_llama_cpp_fails(tiny, tmp_path):
    tokens = list(GGUFFile(tiny.path).metadata["tokenizer.ggml.tokens"].data)
    tokens[2] = "<|stop|>"  # its name alone would make <|im_end|> an end
    keys = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.eos_token_id": 5}
    edit(tiny.path, tmp_path / "other.gguf", keys)
    assert "8 of 8 rows end their turn otherwise" in held(tmp_path / "other.gguf", tiny.path).faults


def test_other_token_ids_fail(tiny, tmp_path):
    tokens = list(GGUFFile(tiny.path).metadata["tokenizer.ggml.tokens"].data)
    e, o = tokens.index("e"), tokens.index("o")
    tokens[e], tokens[o] = tokens[o], tokens[e]
    edit(tiny.path, tmp_path / "other.gguf", {"tokenizer.ggml.tokens": tokens})
    assert "11 of 12 texts have other token ids" in held(tmp_path / "other.gguf", tiny.path).faults


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no user may speak') }}", "{% for %}"], ids=repr)
def test_a_model_that_knows_no_conversations_is_compared_on_texts(make_tiny, template):
    path = make_tiny(template=template).path
    found = held(path, path)
    assert found.faults == []
    assert found.compared.n_rows == 0
    assert found.compared.fidelity.n_tokens > 100


def test_rows_of_the_users_are_compared_and_refused_where_they_cannot_be(tiny, make_tiny, tmp_path):
    row = {"messages": [{"role": "user", "content": "lights"}, {"role": "assistant", "content": "on"}]}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 5, encoding="utf-8")
    rows = rows_to_check(tmp_path / "rows.jsonl", 3)
    assert compared_of(tiny.path, Reference(tiny.path), rows).n_rows == 3
    mute = make_tiny(template="{{ raise_exception('no') }}").path
    with pytest.raises(DataError, match="refused a conversation"):
        compared_of(mute, Reference(mute), rows)


def test_a_checkpoint_is_compared_in_torch_alone(tiny, transformers_model, vocabulary, write_tokenizer, tmp_path):
    """llama.cpp cannot read it: what it computes is still held against what it was made from."""
    template = open_base(tiny.path).own_template
    for name, strength in (("right", 0.0), ("wrong", 0.05)):
        model = transformers_model(tiny)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.add_(strength)
        model.save_pretrained(tmp_path / name)
        write_tokenizer(tmp_path / name, vocabulary, template)
    found = held(tmp_path / "right", tiny.path)
    assert (found.faults, found.compared.fidelity, set(found.types)) == ([], None, {"F32"})
    assert found.compared.loss.kl_mean < 1e-9
    assert found.as_dict()["fidelity"] is None
    assert held(tmp_path / "wrong", tiny.path).faults


@pytest.mark.real
def test_the_real_base_against_itself(smollm):
    """SmolLM2-135M at Q4_1: measured 3.4e-3 mean KL, and nothing is lost against itself."""
    found = certify_model(smollm, Reference(smollm), None)
    assert found.faults == []
    assert 1e-4 < found.compared.fidelity.kl_mean < found.limits.kl_mean / 5
    assert found.compared.loss.kl_mean == pytest.approx(found.compared.fidelity.kl_mean, rel=1e-3)


@pytest.mark.real
def test_a_base_that_loses_much_by_rounding_passes_too(gemma):
    """Gemma-3-270m at Q4_K_M, which has no chat template: measured 5.3e-2 mean KL, fifteen times SmolLM2's."""
    found = held(gemma, gemma)
    assert found.faults == []
    assert found.compared.n_rows == 0
    assert 1e-3 < found.compared.loss.kl_mean < found.limits.kl_mean / 2


# -- the limits ---------------------------------------------------------------------------------------------------


def test_the_limits_of_a_file_are_those_of_its_widest_type():
    floats, quantized = THRESHOLDS[Type.F16], limits_of([Type.Q4_K])
    assert limits_of([Type.F32, Type.F16]) == floats
    assert limits_of([Type.F16, Type.Q4_K, Type.Q8_0]) == quantized
    assert limits_of([]) == floats
    assert quantized.kl_mean > limits_of([Type.Q8_0]).kl_mean > floats.kl_mean


@pytest.mark.parametrize(("found", "passes"), [(same(0.45, top=0.609, flip=3.6), True),
                                              (same(2.4, top=0.234, flip=14.0), False)])  # fmt: skip
def test_two_bits_may_be_near_chaos_and_wrong_rows_are_seen_all_the_same(found, passes):
    """Both measured over SmolLM2-135M at Q2_K, the second with rotary rows in a wrong order."""
    assert (limits_of([Type.F32, Type.Q2_K, Type.Q3_K, Type.Q6_K]).faults(found) == []) is passes


@pytest.mark.parametrize(
    ("found", "faults"),
    [
        (same(0.01), []),
        (same(0.02), ["mean KL 0.02, allowed 0.01"]),
        (same(float("nan")), ["mean KL nan, allowed 0.01"]),
        (same(0.0, top=0.8, flip=0.1), []),  # other tops, but as good as tied
        (same(0.0, top=0.8, flip=0.2), ["same top 80.0%, allowed 90.0%"]),
        (same(0.02, top=0.8, flip=9.0), ["mean KL 0.02, allowed 0.01", "same top 80.0%, allowed 90.0%"]),
    ],
)  # fmt: skip
def test_a_limit_and_what_is_beyond_it(found, faults):
    assert Limits(0.01, 0.9, 0.1).faults(found) == faults


def test_every_fault_is_named():
    compared = {"equal_ids": 11, "equal_text": 7, "equal_ends": 6, "fidelity": same(3.0), "loss": same(9.0)}
    limit = limits_of([Type.Q4_0]).kl_mean
    assert claimed(**compared).faults == [
        "1 of 12 texts have other token ids",
        "1 of 8 rows are rendered otherwise by its template",
        "2 of 8 rows end their turn otherwise",
        f"llama.cpp against torch: mean KL 3, allowed {limit:.2g}",
    ]


# -- the name -----------------------------------------------------------------------------------------------------


def write_signed(path: Path) -> None:
    """The smallest GGUF with a place for a certificate."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string(CERTIFICATE_KEY, reserve(CERTIFICATE_BYTES))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_certificate_stands_in_the_file_and_beside_it(tmp_path):
    out = tmp_path / "mine.Q4_0.gguf"
    certificate = write_certified(Output(out), stamp(), write_signed, lambda _: claimed())
    assert json.loads(GGUFFile(out).get(CERTIFICATE_KEY, str)) == certificate.as_dict()
    assert json.loads(beside(out).read_text(encoding="utf-8")) == {
        "files": {out.name: sha256_file(out)}, **certificate.as_dict()
    }  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.Q4_0.certificate.json", "mine.Q4_0.gguf"]


def test_numbers_stand_beside_the_text(tmp_path):
    """In keys that were reserved, so that the file keeps its size; an adapter's has no loss."""
    for model in (True, False):
        out = tmp_path / f"{model}.gguf"

        def write(draft: Path, model: bool = model) -> None:
            writer = gguf.GGUFWriter(draft, "llama")
            put(writer, reserved(model=model))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()

        write(tmp_path / "empty.gguf")
        certificate = write_certified(
            Output(out), stamp(), write, lambda _: claimed(fidelity=same(0.125, 0.5, 0.1), loss=same(2.0))
        )
        file, prefix = GGUFFile(out), "edgelora.certificate."
        assert json.loads(file.get(f"{prefix}json", str)) == certificate.as_dict()
        assert file.get(f"{prefix}passed", bool) is True
        names = ("fidelity.kl_mean", "fidelity.kl_limit", "fidelity.same_top", "loss.kl_mean")[: 4 if model else 3]
        found = [file.get(prefix + name, float) for name in names]
        assert found == pytest.approx([0.125, certificate.limits.kl_mean, 0.5, 2.0][: len(names)])
        assert len(file.metadata) == len(names) + 3
        assert out.stat().st_size == (tmp_path / "empty.gguf").stat().st_size


def test_a_file_that_must_stay_as_it_is_has_its_certificate_beside_it_only(tmp_path):
    write_certified(Output(tmp_path / "a.gguf", sign=False), stamp(), write_signed, lambda _: claimed())
    write_signed(tmp_path / "plain.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()
    assert json.loads(beside(tmp_path / "a.gguf").read_text(encoding="utf-8"))["passed"] is True


def test_a_folder_has_one_certificate_for_all_its_files(tmp_path):
    def write(draft: Path) -> None:
        (draft / "a").write_bytes(b"a")
        (draft / "b").write_bytes(b"b")

    write_certified(Output(tmp_path / "model", folder=True), stamp(), write, lambda _: claimed())
    stated = json.loads((tmp_path / "model.certificate.json").read_text(encoding="utf-8"))["files"]
    assert stated == {name: sha256_file(tmp_path / "model" / name) for name in ("a", "b")}


def test_what_fails_is_kept_aside_and_what_stood_there_stays(tmp_path):
    out = tmp_path / "mine.gguf"
    out.write_bytes(b"old")
    (tmp_path / "mine.gguf.rejected").write_bytes(b"an older one")
    with pytest.raises(CertificateError) as error:
        write_certified(Output(out, overwrite=True), stamp(), write_signed, lambda _: claimed(equal_ids=10))
    assert str(error.value).splitlines() == [
        f"{out}: llama.cpp does not compute with it what torch does (2 of 12 texts have other token ids)",
        "  why: the export or this build of llama.cpp is wrong for this model",
        "  fix: please report it with the output of `edgelora doctor`; what was written is kept as mine.gguf.rejected",
    ]
    assert error.value.exit_code == 3
    assert out.read_bytes() == b"old"
    aside = json.loads(GGUFFile(tmp_path / "mine.gguf.rejected").get(CERTIFICATE_KEY, str))
    assert aside["passed"] is False
    stated = json.loads((tmp_path / "mine.gguf.rejected.certificate.json").read_text(encoding="utf-8"))
    assert stated == {"files": {"mine.gguf.rejected": sha256_file(tmp_path / "mine.gguf.rejected")}, **aside}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "mine.gguf", "mine.gguf.rejected", "mine.gguf.rejected.certificate.json",
    ]  # fmt: skip


def test_an_existing_file_is_refused_before_the_work(tmp_path):
    (tmp_path / "out.gguf").write_bytes(b"kept")
    with pytest.raises(OutputError, match="exists already"):
        write_certified(Output(tmp_path / "out.gguf"), stamp(), lambda _: pytest.fail("began"), lambda _: claimed())


def test_names_that_differ_behind_a_dot_have_certificates_of_their_own(tmp_path):
    for name in ("model-v1.0", "model-v1.5", "model-v1.0.gguf", "model-v1.5.gguf"):
        write_certified(Output(tmp_path / name, overwrite=True), stamp(), write_signed, lambda _: claimed())
    assert beside(Path("model-v1.0")).name == "model-v1.0.certificate.json"
    for name in ("model-v1.0.gguf", "model-v1.5.gguf"):
        assert name in json.loads(beside(tmp_path / name).read_text(encoding="utf-8"))["files"]


@pytest.mark.parametrize("text", ['{"files": {"mine": "0"}}', "notes of mine", "[]", '{"files": 1}'])
def test_what_is_not_its_certificate_is_not_replaced(tmp_path, text):
    out = Output(tmp_path / "mine.gguf")
    beside(out.path).write_text(text, encoding="utf-8")
    with pytest.raises(OutputError, match=r"certificate\.json: this file exists already"):
        write_certified(out, stamp(), lambda _: pytest.fail("began"), lambda _: claimed())
    assert beside(out.path).read_text(encoding="utf-8") == text
    write_certified(Output(out.path, overwrite=True), stamp(), write_signed, lambda _: claimed())
    out.path.unlink()
    write_certified(out, stamp(), write_signed, lambda _: claimed())  # its own, of a file that is gone


# -- what it is made from stays what it was -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["rewritten", "in secret", "longer", "replaced", "gone", "touched"])
def test_a_base_that_changes_while_it_is_read_is_not_used(tmp_path, how):
    base, out = tmp_path / "base.gguf", tmp_path / "out.gguf"
    base.write_bytes(b"base")
    os.utime(base, ns=(1, 1))
    out.write_bytes(b"old")

    def write(draft: Path) -> None:
        write_signed(draft)
        match how:
            case "rewritten":
                base.write_bytes(b"BASE")
            case "in secret":
                base.write_bytes(b"BASE")
                os.utime(base, ns=(1, 1))
            case "longer":
                base.write_bytes(b"base and more")
                os.utime(base, ns=(1, 1))
            case "replaced":
                (tmp_path / "new").write_bytes(b"BASE")
                os.utime(tmp_path / "new", ns=(1, 1))
                (tmp_path / "new").replace(base)
            case "gone":
                base.unlink()
            case "touched":
                os.utime(base, ns=(2, 2))

    with pytest.raises(BaseModelError) as error:
        write_certified(Output(out, overwrite=True), stamp(base), write, lambda _: claimed(equal_ids=0))
    assert str(error.value).splitlines()[0] == f"{base}: changed while it was read"
    assert out.read_bytes() == b"old"
    assert {p.name for p in tmp_path.iterdir()} <= {"base.gguf", "out.gguf"}  # and nothing is kept aside


@pytest.mark.parametrize("at", [0, 132_112 * 7, (1 << 23) + 4], ids=["begin", "middle", "end"])
def test_of_a_large_file_blocks_are_compared(tmp_path, at):
    base = tmp_path / "base.gguf"
    with base.open("wb") as f:
        f.truncate((1 << 23) + 5)
    stamps, before = stamp(base), base.stat().st_mtime_ns
    with base.open("r+b") as f:
        f.seek(at)
        f.write(bytes(1))
        os.utime(base, ns=(before, before))
        stamps.require_unchanged()  # written, and the same
        f.seek(at)
        f.write(b"1")
    os.utime(base, ns=(before, before))
    with pytest.raises(BaseModelError, match="changed while it was read"):
        stamps.require_unchanged()


@pytest.mark.parametrize("place", ["base.gguf", "link.gguf", "hf", "mine", "hf/config.json", "hf/../base.gguf"])
def test_a_result_never_takes_the_place_of_what_it_is_made_from(tmp_path, place):
    hf, base = tmp_path / "hf", tmp_path / "base.gguf"
    hf.mkdir()
    for path in (base, hf / "config.json", tmp_path / "mine.certificate.json"):
        path.write_bytes(b"precious")
    (tmp_path / "link.gguf").symlink_to(base)
    made_from = stamp(base, hf, tmp_path / "mine.certificate.json")
    with pytest.raises(OutputError) as error:
        write_certified(
            Output(tmp_path / place, overwrite=True, folder=place == "hf"), made_from,
            lambda _: pytest.fail("began"), lambda _: claimed(),
        )  # fmt: skip
    assert "it would be written over" in error.value.what
    assert str(error.value).splitlines()[1:] == [
        "  why: that is what it is made from, and would be gone",
        "  fix: choose another name for the result",
    ]
    made_from.require_unchanged()


def test_of_a_folder_and_of_a_split_model_every_file_counts(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    parts = [tmp_path / f"a[1]-{n:05}-of-00002.gguf" for n in (1, 2)]
    for path in (folder / "model.safetensors", folder / "config.json", *parts, tmp_path / "other.gguf"):
        path.write_bytes(b"x")
    stamps = stamp(folder, parts[0])
    assert set(stamps.marks) == {folder / "model.safetensors", folder / "config.json", *parts}
    (tmp_path / "other.gguf").write_bytes(b"yy")
    stamps.require_unchanged()
    parts[1].write_bytes(b"yy")
    with pytest.raises(BaseModelError, match="00002-of-00002"):
        stamps.require_unchanged()
