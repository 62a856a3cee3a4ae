"""Quantizing whole files: llama.cpp's choice of types, its very bytes, and what is refused before it is asked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from math import prod

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type
from test_export import make_adapter
from test_imatrix import renamed

from converters.imatrix import Importance, write_importance
from converters.metadata import copy_metadata
from converters.plan import QuantizeOptions, plan_types, read_plan, write_plan
from converters.plan_check import check_importance, check_options, check_plan
from converters.quant_types import COPY, IMPORTANCE_TYPES, NEEDS_IMPORTANCE, QUANT_TYPES, requires_importance
from converters.quantize import write_planned, write_quantized
from edgelora.base import ggml
from edgelora.base.model import open_base
from edgelora.cli import run
from edgelora.device import processor_flags
from edgelora.errors import ConfigError, ExportError, FileFormatError, OutputError
from edgelora.files.atomic import STAGE_PREFIX
from edgelora.files.contract import CERTIFICATE_BYTES, CERTIFICATE_KEY, sha256_file
from edgelora.files.gguf import GGUFFile, TensorInfo
from edgelora.files.split import open_gguf
from edgelora.peft.adapter import write_adapter
from edgelora.pipeline.certificate import certify_foreign
from edgelora.pipeline.merge import MergeOptions, Wanted, open_parts, write_gguf
from edgelora.pipeline.quantize import QuantizeSettings, dry_run_of, prepare, quantize

# sha256 of what llama-quantize made of SmolLM2's Q4_1, and then of that F16 file.
REFERENCE = {
    "F16": "a269e3181fcbb25046f99f64ba8d3c159165b211c2ff4ffca7ba1bb219d2ccd0",
    "Q8_0": "f7933c716a5b5334c54b997d1f6db3f38a0786c9046ac5f46311b396a3f1fe54",
    "Q4_K_M": "27e1496775b07d69415cc5b6658f448ded3829cd2d769473cf2781e77d020b19",
    "Q4_0": "5ba170526794902da0dd135b235a1627c1eb0aa02a93e3a18b4bbeae783b929c",
    "Q2_K": "c7c9a27bc9b5004eaa297bc6ed0296f70a2783d0680f02315d9ec262362b6f44",
}
PLAIN = QuantizeSettings(plain=True)
# ggml takes seconds to build their tables, whatever the size of the model; IQ2_XXS and IQ3_XS stand for them.
SLOW = ("IQ1_S", "IQ1_M", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS")
CHEAP = [kind for kind in QUANT_TYPES if kind not in SLOW]


@pytest.fixture(scope="session")
def llama_quantize():
    """llama.cpp's own program: `llama_quantize(*words)`. Skips where there is none."""
    found = shutil.which("llama-quantize", path=os.environ.get("EDGELORA_LLAMA_TOOLS"))
    if found is None:
        pytest.skip("no llama-quantize in EDGELORA_LLAMA_TOOLS or PATH")

    def call(*words):
        return subprocess.run([found, *map(str, words)], capture_output=True, text=True, timeout=120, check=False)

    return call


@pytest.fixture(scope="session")
def importance(tiny):
    """Seeded importance of every matrix of the layers, as llama-imatrix would count it."""
    draw = np.random.default_rng(7)
    sums = {
        name: draw.uniform(0.01, 9, (1, info.shape[-1])).astype(np.float32)
        for name, info in GGUFFile(tiny.path).tensors.items() if name.startswith("blk.") and len(info.shape) > 1
    }  # fmt: skip
    return Importance(sums, {name: np.array([64]) for name in sums}, 2, 32, ("rows.jsonl",))


@pytest.fixture(scope="session")
def imatrix(importance, tmp_path_factory):
    path = tmp_path_factory.mktemp("imatrix") / "tiny.gguf"
    write_importance(path, importance)
    return path


@pytest.fixture(scope="session")
def experts(tiny, tmp_path_factory):
    """A tiny model with four experts in each layer, random ones, as Mixtral's GGUF holds them."""
    path, file, draw = (
        tmp_path_factory.mktemp("experts") / "experts.gguf",
        GGUFFile(tiny.path),
        np.random.default_rng(3),
    )
    writer = gguf.GGUFWriter(path, "llama")
    copy_metadata(file, writer)
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    for name, info in file.tensors.items():
        weights = file.rows(name).view(np.float32).reshape(info.shape)
        if ".ffn_" in name and "norm" not in name:
            name = name.replace(".weight", "_exps.weight")
            weights = draw.normal(0, 0.05, (4, *info.shape)).astype(np.float32)
        writer.add_tensor(name, weights)
    for layer in (0, 1):
        writer.add_tensor(f"blk.{layer}.ffn_gate_inp.weight", draw.normal(0, 0.05, (4, 256)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_plain(source, out, kind, **settings):
    """What `quantize --plain` writes, without its check; returns the plan."""
    asked = prepare(source, kind, QuantizeSettings(plain=True, **settings))
    write_quantized(asked.source, out, asked.options, keys=asked.keys)
    return asked.plan


def merged(base, adapter, out, kind="F16", imatrix=None) -> list[str]:
    """What `merge` writes, without its check; returns its notes."""
    opened, parts = open_parts(base, [(adapter, 1.0)], allow_unverified=False)
    return write_gguf(out, opened, parts, Wanted.read(kind, MergeOptions(imatrix)))


def expert_importance(path) -> dict[str, np.ndarray]:
    """Another row of importance for every expert."""
    draw = np.random.default_rng(11)
    shapes = {name: info.shape for name, info in GGUFFile(path).tensors.items() if name.startswith("blk.")}
    return {
        name: draw.uniform(0.01, 9, prod(shape[:-2]) * shape[-1]).astype(np.float32)
        for name, shape in shapes.items() if len(shape) > 1
    }  # fmt: skip


# -- the same bytes -----------------------------------------------------------------------------------------------


@pytest.mark.real
def test_the_files_are_those_that_llama_quantize_wrote(smollm, tmp_path):
    half = tmp_path / "F16.gguf"
    write_plain(smollm, half, "F16", allow_requantize=True)
    assert sha256_file(half) == REFERENCE["F16"]
    if "avx512f" not in processor_flags():
        pytest.skip("the hashes of quantized rows were made with AVX-512; elsewhere last digits can differ")
    for kind in ("Q8_0", "Q4_K_M", "Q4_0", "Q2_K"):
        plan = write_plain(half, tmp_path / "out.gguf", kind)
        assert sha256_file(tmp_path / "out.gguf") == REFERENCE[kind], kind
        assert plan.file_bytes == (tmp_path / "out.gguf").stat().st_size
        write_planned(half, tmp_path / "planned.gguf", plan)
        assert sha256_file(tmp_path / "planned.gguf") == REFERENCE[kind], kind


@pytest.mark.parametrize("kind", [k for k in CHEAP if k not in NEEDS_IMPORTANCE])
def test_llama_quantize_writes_the_same(llama_quantize, tiny, tmp_path, kind):
    llama_quantize(tiny.path, tmp_path / "theirs.gguf", kind, 1)
    write_plain(tiny.path, tmp_path / "ours.gguf", kind)
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


OPTIONS = {
    "tensor types": (
        ("--tensor-type", "attn_v=q8_0", "--tensor-type", r"blk\.0\.ffn=q6_k"),
        {"tensor_types": (("attn_v", "Q8_0"), (r"blk\.0\.ffn", "Q6_K"))},
    ),
    "embeddings": (("--token-embedding-type", "q5_1"), {"embedding_type": "q5_1"}),
    "head": (("--output-tensor-type", "iq4_nl"), {"output_type": "IQ4_NL"}),
    "pure": (("--pure",), {"pure": True}),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_llama_quantize_does_the_same_with_options(llama_quantize, make_tiny, tmp_path, option, tied):
    words, settings = OPTIONS[option]
    source = make_tiny(Type.F32, tied=tied).path
    llama_quantize(*words, source, tmp_path / "theirs.gguf", "Q4_K_M", 1)
    write_plain(source, tmp_path / "ours.gguf", "Q4_K_M", **settings)
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K_M", "IQ2_XXS", "IQ3_XS", "Q2_K_S", "IQ4_XS"])
def test_llama_quantize_does_the_same_with_importance(llama_quantize, tiny, imatrix, tmp_path, kind):
    llama_quantize("--imatrix", imatrix, tiny.path, tmp_path / "theirs.gguf", kind, 1)
    write_plain(tiny.path, tmp_path / "ours.gguf", kind, imatrix=imatrix)
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


@pytest.mark.parametrize("known", [False, True], ids=["alone", "importance"])
@pytest.mark.parametrize("kind", [*CHEAP, *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in SLOW)])
def test_ggmls_kernels_write_by_a_plan_what_llama_cpp_writes(tiny, importance, tmp_path, kind, known):
    if kind == COPY and known:
        pytest.skip("a copy has no use for importance")
    if kind in NEEDS_IMPORTANCE and not known:
        pytest.skip("refused, which another test holds")
    options = QuantizeOptions(kind, imatrix=importance.weights() if known else None)
    plan = plan_types(tiny.path, options)
    write_quantized(tiny.path, tmp_path / "whole.gguf", options)
    write_planned(tiny.path, tmp_path / "planned.gguf", plan, options.imatrix)
    assert (tmp_path / "planned.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert (tmp_path / "planned.gguf").stat().st_size == plan.file_bytes
    written = GGUFFile(tmp_path / "planned.gguf").tensors
    assert {name: info.type for name, info in written.items()} == plan.types
    assert sum(info.size_bytes for info in written.values()) == plan.size_bytes


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q2_K", "MXFP4_MOE", "IQ4_XS"])
def test_each_expert_is_quantized_by_its_own_importance(experts, tmp_path, kind):
    options = QuantizeOptions(kind, imatrix=expert_importance(experts))
    plan = plan_types(experts, options)
    write_quantized(experts, tmp_path / "whole.gguf", options)
    write_planned(experts, tmp_path / "planned.gguf", plan, options.imatrix)
    assert (tmp_path / "planned.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    name = "blk.1.ffn_up_exps.weight"
    source, written = GGUFFile(experts), GGUFFile(tmp_path / "planned.gguf")
    third = slice(2 * 512, 3 * 512)  # the rows of expert 2
    hint = options.imatrix[name].reshape(4, 256)[2]
    alone = ggml.quantize(source.rows(name).view(np.float32)[third], plan.types[name], hint)
    np.testing.assert_array_equal(written.rows(name)[third], alone)


def test_parts_are_read_as_one_and_kept_as_parts(tiny, tmp_path):
    first, folder = split_in_two(tiny.path, tmp_path), tmp_path / "small"
    write_quantized(tiny.path, tmp_path / "whole.gguf", QuantizeOptions("Q4_K_M"))
    write_planned(first, tmp_path / "one.gguf", plan_types(first, QuantizeOptions("Q4_K_M")))
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    done = quantize(first, folder, "Q4_K_M", QuantizeSettings(keep_split=True))
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["small-00001-of-00002.gguf", "small-00002-of-00002.gguf"]
    assert done.size_bytes == sum(path.stat().st_size for path in folder.iterdir())
    parts = open_gguf(folder / names[0])
    assert {name: info.type for name, info in parts.tensors.items()} == done.plan.types
    assert abs(done.plan.file_bytes / done.size_bytes - 1) < 0.01
    with pytest.raises(ConfigError, match="it is one file"):
        quantize(tiny.path, tmp_path / "other", "Q4_K_M", QuantizeSettings(keep_split=True))


def test_parts_do_not_keep_the_certificate_of_their_source(tiny, tmp_path):
    first = split_in_two(tiny.path, tmp_path, certificate='{"passed": true}')
    for plain in (False, True):
        (tmp_path / str(plain)).mkdir()
        asked = prepare(first, "Q4_0", QuantizeSettings(keep_split=True, plain=plain))
        write_quantized(asked.source, tmp_path / str(plain) / "out", asked.options, keys=asked.keys)
        written = GGUFFile(tmp_path / str(plain) / "out-00001-of-00002.gguf")
        assert written.get(CERTIFICATE_KEY, str) == ('{"passed": true}' if plain else "")


def test_llama_quantize_keeps_the_same_parts(llama_quantize, tiny, tmp_path):
    first = split_in_two(tiny.path, tmp_path)
    llama_quantize("--keep-split", first, tmp_path / "theirs.gguf", "Q4_K_M", 1)
    write_plain(first, tmp_path / "ours", "Q4_K_M", keep_split=True)
    for part in ("00001-of-00002", "00002-of-00002"):
        assert (tmp_path / f"ours-{part}.gguf").read_bytes() == (tmp_path / f"theirs-{part}.gguf").read_bytes()


def split_in_two(source, folder, certificate=None):
    """The model in two files, as gguf-split writes them."""
    file = GGUFFile(source)
    names = [list(file.tensors)[::2], list(file.tensors)[1::2]]
    for i, mine in enumerate(names):
        path = folder / f"parts-{i + 1:05d}-of-00002.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        if i == 0:
            copy_metadata(file, writer)
            if certificate is not None:
                writer.add_string(CERTIFICATE_KEY, certificate)
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(file.tensors))
        for name in mine:
            writer.add_tensor(name, file.rows(name).view(np.float32).reshape(file.tensors[name].shape))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return folder / "parts-00001-of-00002.gguf"


# -- plans --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k in QUANT_TYPES if k != COPY])
def test_the_recipes_that_need_importance_are_those_whose_tensors_do(tiny, kind):
    plan = plan_types(tiny.path, QuantizeOptions(kind))
    needing = [t for t in plan.tensors if requires_importance(t.name, t.type, QUANT_TYPES[kind])]
    assert bool(needing) == (kind in NEEDS_IMPORTANCE)
    assert all(t.type in IMPORTANCE_TYPES or t.type == Type.Q2_K for t in needing)


def test_a_header_without_tensors_gives_the_same_plan(tiny, tmp_path):
    file, sparse = GGUFFile(tiny.path), tmp_path / "sparse.gguf"
    begin = min(info.offset for info in file.tensors.values())
    with sparse.open("wb") as f:
        f.write(tiny.path.read_bytes()[:begin])
        f.truncate(file.size_bytes)
    assert plan_types(sparse, QuantizeOptions("Q4_K_M")) == plan_types(tiny.path, QuantizeOptions("Q4_K_M"))


@pytest.mark.real
def test_what_falls_back_is_said(smollm):
    assert plan_types(smollm, QuantizeOptions("Q4_K_M")).notes == [
        "180 of 272 tensors have rows of 576, no multiple of 256: Q4_K → Q5_0 (166), Q6_K → Q8_0 (14)"
    ]


def test_nothing_falls_back_where_rows_divide(tiny):
    assert plan_types(tiny.path, QuantizeOptions("Q4_K_M")).notes == []


def test_a_plan_file_is_read_as_it_was_written_and_edited(tiny, tmp_path):
    plan = plan_types(tiny.path, QuantizeOptions("Q4_K_M"))
    write_plan(tmp_path / "plan.toml", plan)
    assert read_plan(tmp_path / "plan.toml") == plan
    text = (tmp_path / "plan.toml").read_text(encoding="utf-8")
    edited = text.replace('"blk.0.attn_q.weight" = { type = "Q4_K"', '"blk.0.attn_q.weight" = { type = "Q8_0"')
    (tmp_path / "plan.toml").write_text(edited, encoding="utf-8")
    changed = read_plan(tmp_path / "plan.toml")
    assert changed == plan.with_types({"blk.0.attn_q.weight": Type.Q8_0})
    write_planned(tiny.path, tmp_path / "out.gguf", changed)
    assert GGUFFile(tmp_path / "out.gguf").tensors["blk.0.attn_q.weight"].type == Type.Q8_0
    assert open_base(tmp_path / "out.gguf").quant == "Q4_K_M"
    with pytest.raises(KeyError, match="no_such"):
        plan.with_types({"no_such": Type.Q8_0})


def test_every_fault_of_a_plan_file_is_named(tiny, tmp_path):
    write_plan(tmp_path / "plan.toml", plan_types(tiny.path, QuantizeOptions("Q4_K_M")))
    text = (tmp_path / "plan.toml").read_text(encoding="utf-8")
    text = text.replace('"Q4_K_M"', '"Q9"').replace(
        'attn_q.weight" = { type = "Q4_K"', 'attn_q.weight" = { type = "Q9"'
    )
    (tmp_path / "plan.toml").write_text(text, encoding="utf-8")
    with pytest.raises(FileFormatError) as error:
        read_plan(tmp_path / "plan.toml")
    assert "kind is 'Q9'" in error.value.what
    assert "blk.0.attn_q.weight: Q9: no such type" in error.value.what
    assert "blk.1.attn_q.weight: Q9: no such type" in error.value.what


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("no toml", "Expected '='"),
        ('kind = "Q4_0"\nheader_bytes = 64', "it names no tensors"),
        ('kind = "Q4_0"\n[tensors]\na = 1', "header_bytes is missing"),
        ('kind = "Q4_0"\nheader_bytes = 64\n[tensors]\na = { type = "F32", from = "F32", shape = [0] }', "shape is"),
        ('kind = "Q4_0"\nheader_bytes = 64\n[tensors]\na = { type = "Q4_0", from = "F32", shape = [3] }', "rows of 3"),
        ('kind = "Q4_0"\nheader_bytes = 64\n[tensors]\na = { type = "Q8_1", from = "F32", shape = [32] }', "Q8_1: no"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path, text, fault):
    (tmp_path / "plan.toml").write_text(text, encoding="utf-8")
    with pytest.raises(FileFormatError) as error:
        read_plan(tmp_path / "plan.toml")
    assert fault in error.value.what


def test_a_plan_for_another_model_is_refused_with_every_fault(tiny):
    tensors = GGUFFile(tiny.path).tensors
    plan = plan_types(tiny.path, QuantizeOptions("Q8_0"))
    others = {("other.weight" if name == "token_embd.weight" else name): info for name, info in tensors.items()}
    with pytest.raises(ConfigError) as error:
        check_plan(plan.with_types({"output_norm.weight": Type.F16}), others)
    assert "token_embd.weight is not in the model" in error.value.what
    assert "other.weight is not in the plan" in error.value.what
    assert "output_norm.weight must stay F32" in error.value.what


# -- refusals -----------------------------------------------------------------------------------------------------


def test_a_type_that_needs_importance_says_where_it_comes_from(tiny, tmp_path):
    with pytest.raises(ExportError) as error:
        quantize(tiny.path, tmp_path / "out.gguf", "IQ2_XXS")
    what, why, fix = str(error.value).splitlines()
    assert what.startswith("IQ2_XXS: ")
    assert "need an importance matrix" in what
    assert why == "  why: at so few bits the result is garbage unless the columns that matter are known"
    assert fix == "  fix: make one with `edgelora imatrix MODEL --data ROWS --out FILE` and pass --imatrix FILE"
    assert list(tmp_path.iterdir()) == []


def test_pure_embeddings_of_two_bits_do_not_end_the_process(tiny, importance):
    """llama.cpp aborts: llama-imatrix counts no embeddings, and it asks for no importance there."""
    options = QuantizeOptions("IQ2_XXS", pure=True, imatrix=importance.weights())
    with pytest.raises(ExportError, match=r"token_embd\.weight as IQ2_XXS"):
        check_importance(plan_types(tiny.path, options), options.imatrix)


@pytest.mark.parametrize(
    ("values", "fault"),
    [(np.ones(255, np.float32), "255 importances, expected 256"), (np.full(256, np.nan, np.float32), "no number")],
)
def test_importance_that_does_not_fit_is_refused(tiny, values, fault):
    options = QuantizeOptions("Q4_K_M", imatrix={"blk.0.attn_q.weight": values})
    with pytest.raises(ExportError, match=fault):
        check_importance(plan_types(tiny.path, options), options.imatrix)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K_M"])
def test_a_merge_refuses_importance_of_another_model(tiny, tmp_path, kind):
    write_adapter(tmp_path / "mine", make_adapter(open_base(tiny.path)))
    other = Importance(
        {"blk.7.attn_q.weight": np.ones((1, 256), np.float32)}, {"blk.7.attn_q.weight": np.array([4])}, 1, 4, ("x",)
    )
    write_importance(tmp_path / "other.gguf", other)
    with pytest.raises(ExportError, match=r"does not fit the model: blk\.7\.attn_q\.weight is no tensor"):
        merged(tiny.path, tmp_path / "mine", tmp_path / "out.gguf", kind, tmp_path / "other.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("kind", ["F16", "BF16", "F32"])
def test_a_merge_into_floats_has_no_use_for_importance(imatrix, kind):
    with pytest.raises(ConfigError, match=f"--imatrix .* with {kind}"):
        Wanted.read(kind, MergeOptions(imatrix))


def test_a_bad_pattern_is_a_setting_that_cannot_be(tiny):
    with pytest.raises(ConfigError, match="no regular expression"):
        plan_types(tiny.path, QuantizeOptions("Q4_K_M", tensor_types=(("attn_(v", "Q8_0"),)))


def test_a_pattern_that_finds_nothing_is_said(tiny):
    (note,) = prepare(
        tiny.path, "Q4_K_M", QuantizeSettings(tensor_types=(("attn_x", "Q8_0"), ("attn_v", "Q8_0")))
    ).notes
    assert note == "--tensor-type attn_x: in no tensor's name"


NARROW = {
    name: TensorInfo(name, (512, 96), Type.F32, 0, 512 * 96 * 4) for name in ("token_embd.weight", "output.weight")
}


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (QuantizeOptions("Q9_K"), "Q9_K: no such quantization type"),
        (QuantizeOptions("Q4_K_M", threads=-1), "-1 threads"),
        (QuantizeOptions("Q4_K_M", tensor_types=(("attn", "Q4_K_M"),)), "Q4_K_M: no such type of a tensor"),
        (QuantizeOptions("Q4_K_M", tensor_types=(("attn", "Q8_1"),)), "Q8_1: no such type of a tensor"),
        (QuantizeOptions("Q4_K_M", embedding_type="Q4_K"), r"token_embd\.weight cannot be Q4_K"),
        (QuantizeOptions("Q4_K_M", output_type="IQ4_XS"), r"output\.weight cannot be IQ4_XS"),
        (QuantizeOptions("F16", tensor_types=(("attn", "Q8_0"),)), "--tensor-type and --pure with F16"),
        (QuantizeOptions("COPY", embedding_type="F16"), "types and importance with COPY"),
    ],
)
def test_options_that_cannot_be_are_refused_before_llama_cpp_sees_them(options, fault):
    with pytest.raises(ConfigError, match=fault):
        check_options(options, NARROW)


def test_a_quantized_source_is_refused_unless_asked_for(make_tiny, tmp_path):
    source = make_tiny(Type.Q8_0).path
    with pytest.raises(OutputError, match="Q8_0 already"):
        quantize(source, tmp_path / "out.gguf", "Q4_0")
    (note,) = prepare(source, "Q4_0", QuantizeSettings(allow_requantize=True)).notes
    assert "adds a second error" in note
    (note,) = prepare(source, "F16", QuantizeSettings(allow_requantize=True)).notes
    assert "take more room and are no better" in note
    assert not prepare(source, COPY).notes


@pytest.mark.parametrize("settings", [PLAIN, QuantizeSettings()], ids=["llama.cpp", "planned"])
def test_a_failed_run_leaves_nothing(tiny, tmp_path, settings):
    damaged = tmp_path / "in" / "nan.gguf"
    damaged.parent.mkdir()
    data = bytearray(tiny.path.read_bytes())
    info = GGUFFile(tiny.path).tensors["blk.1.ffn_up.weight"]
    data[info.offset : info.offset + 4] = np.float32(np.nan).tobytes()
    damaged.write_bytes(data)
    with pytest.raises(ExportError):
        quantize(damaged, tmp_path / "out.gguf", "Q4_0", settings)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert not list(tmp_path.rglob(f"{STAGE_PREFIX}*"))


def test_a_full_disk_is_said_before_the_work(tiny, tmp_path, monkeypatch):
    plan = plan_types(tiny.path, QuantizeOptions("Q8_0"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=plan.file_bytes))
    with pytest.raises(OutputError, match=r"the quantized weights need .* bytes, and"):
        quantize(tiny.path, tmp_path / "out.gguf", "Q8_0")  # the certificate's room comes to it
    quantize(tiny.path, tmp_path / "out.gguf", "Q8_0", PLAIN)


@pytest.mark.parametrize("words", [["Q8_0"], ["q4_k_m", "--plan", "plan.toml"]])
def test_a_type_alone_is_no_file_to_write(tiny, tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    write_plan(tmp_path / "plan.toml", plan_types(tiny.path, QuantizeOptions("Q4_K_M")))
    assert run(["quantize", str(tiny.path), *words]) == 2
    assert "name the file to write" in capsys.readouterr().err
    assert run(["quantize", str(tiny.path), *words, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["type"] == words[0].upper()
    assert [path.name for path in tmp_path.iterdir()] == ["plan.toml"]


@pytest.mark.parametrize("place", ["out.gguf", "out.certificate.json", "source.gguf", "there.toml"])
def test_a_plan_that_cannot_be_saved_is_refused_before_the_work(tiny, tmp_path, monkeypatch, place):
    source = tmp_path / "source.gguf"
    shutil.copyfile(tiny.path, source)
    (tmp_path / "there.toml").write_text("mine", encoding="utf-8")
    monkeypatch.setattr("edgelora.pipeline.quantize.prepare", lambda *_: pytest.fail("began"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for overwrite in (False,) if place == "there.toml" else (False, True):
        with pytest.raises(OutputError, match=place.replace(".", r"\.")):
            quantize(source, tmp_path / "out.gguf", "Q8_0", save_plan=tmp_path / place, overwrite=overwrite)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_failed_run_saves_no_plan(tiny, tmp_path, monkeypatch):
    def fail(*_):
        raise ExportError("it", "failed", "here")

    monkeypatch.setattr("edgelora.pipeline.quantize._write", fail)
    with pytest.raises(ExportError):
        quantize(tiny.path, tmp_path / "out.gguf", "Q8_0", save_plan=tmp_path / "plan.toml")
    assert list(tmp_path.iterdir()) == []


def test_the_source_and_what_else_is_read_are_never_written_over(tiny, imatrix, tmp_path):
    source, known = tmp_path / "source.gguf", tmp_path / "imatrix.gguf"
    shutil.copyfile(tiny.path, source)
    shutil.copyfile(imatrix, known)
    for out in (source, known):
        with pytest.raises(OutputError, match="it would be written over"):
            quantize(source, out, "Q8_0", QuantizeSettings(imatrix=known), overwrite=True)
    with pytest.raises(OutputError, match="it would be written over"):
        dry_run_of(source, "Q8_0", save_plan=source, overwrite=True)
    assert source.read_bytes() == tiny.path.read_bytes()
    assert known.read_bytes() == imatrix.read_bytes()


# -- what a merge left in its weights -----------------------------------------------------------------------------


def test_a_merge_that_would_snap_back_is_told_at_the_second_step_too(make_tiny, tiny, tmp_path):
    """Q4_0 + an adapter that was trained over it → F16 → Q4_K_M; not over the original, nor into Q8_0."""
    q4, half, again = make_tiny(Type.Q4_0).path, tmp_path / "half.gguf", tmp_path / "again.gguf"
    write_adapter(tmp_path / "mine", make_adapter(open_base(q4)))
    assert any("quantize it below 8 bits" in note for note in merged(q4, tmp_path / "mine", half))
    (note,) = prepare(half, "Q4_K_M").notes
    assert "an adapter was merged into half.gguf over weights that had been Q4_0" in note
    assert "snap back" in note
    assert prepare(half, "Q8_0").notes == []
    write_plain(half, tmp_path / "eight.gguf", "Q8_0")  # the statement goes along
    (first, second) = prepare(tmp_path / "eight.gguf", "Q4_0", QuantizeSettings(allow_requantize=True)).notes
    assert "adds a second error" in first
    assert "over weights that had been Q4_0" in second
    write_adapter(tmp_path / "second", make_adapter(open_base(half), seed=5))
    merged(half, tmp_path / "second", again)
    assert any("snap back" in note for note in prepare(again, "Q4_0").notes)
    assert any("snap back" in note for note in merged(half, tmp_path / "second", again, "Q4_0"))
    assert merged(tiny.path, tmp_path / "mine", half) == []
    assert prepare(half, "Q4_0").notes == []


# -- what is written, shown and said ------------------------------------------------------------------------------


def test_a_file_says_who_made_it_and_has_room_for_its_certificate(tiny, imatrix, tmp_path):
    done = quantize(tiny.path, tmp_path / "out.gguf", "Q4_K_M", QuantizeSettings(imatrix=imatrix))
    file = GGUFFile(done.path)
    assert file.get("general.quantized_by", str).startswith("edgelora ")
    assert len(file.get(CERTIFICATE_KEY, str)) == CERTIFICATE_BYTES
    assert json.loads(file.get(CERTIFICATE_KEY, str)) == done.certificate.as_dict()
    assert file.get("quantize.imatrix.file", str) == "tiny.gguf"
    assert file.get("quantize.imatrix.dataset", str) == "rows.jsonl"
    assert file.get("quantize.imatrix.entries_count", int) == 14
    assert file.get("quantize.imatrix.chunks_count", int) == 2
    assert done.size_bytes == done.plan.file_bytes
    before = GGUFFile(tiny.path).metadata.keys()
    assert before <= file.metadata.keys()


@pytest.mark.parametrize("settings", [PLAIN, QuantizeSettings()], ids=["llama.cpp", "planned"])
def test_progress_counts_tensors_and_the_time_that_is_left(tiny, tmp_path, settings):
    events = []
    quantize(tiny.path, tmp_path / "out.gguf", "Q4_K_M", settings, on_progress=events.append)
    told = [p for p in events if p.stage == "quantize Q4_K_M"]
    tensors = len(GGUFFile(tiny.path).tensors)
    assert {p.total for p in told} == {tensors}
    assert [p.step for p in told] == sorted({p.step for p in told})
    assert len(told) == tensors
    assert all(p.eta_s is not None and p.eta_s >= 0 for p in told[1:])


def test_a_dry_run_shows_what_would_be_and_writes_nothing(tiny, tmp_path, capsys):
    before = hashlib.sha256(tiny.path.read_bytes()).hexdigest()
    words = ["quantize", str(tiny.path), "Q4_K_M", "--dry-run", "--plain"]
    assert run([*words, "--json", "--save-plan", str(tmp_path / "plan.toml")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.toml"]
    assert run(["quantize", str(tiny.path), str(tmp_path / "out.gguf"), "Q4_K_M", "--plain"]) == 0
    capsys.readouterr()
    assert found["size_bytes"] == (tmp_path / "out.gguf").stat().st_size
    assert found["out"] is None
    assert sum(row["tensors"] for row in found["types"].values()) == len(GGUFFile(tiny.path).tensors)
    assert run(words) == 0
    shown = capsys.readouterr().out
    assert f"the file will have {found['size_bytes']:,} bytes" in shown
    assert "Q6_K" in shown
    assert hashlib.sha256(tiny.path.read_bytes()).hexdigest() == before


def test_a_saved_plan_is_used_again(tiny, tmp_path, capsys):
    plan = tmp_path / "plan.toml"
    one, two = str(tmp_path / "one.gguf"), str(tmp_path / "two.gguf")
    assert (
        run(["quantize", str(tiny.path), one, "Q4_K_M", "--tensor-type", "attn_v=Q8_0", "--save-plan", str(plan)]) == 0
    )
    assert run(["quantize", str(tiny.path), two, "--plan", str(plan)]) == 0
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    assert GGUFFile(two).tensors["blk.0.attn_v.weight"].type == Type.Q8_0
    assert run(["quantize", str(tiny.path), two, "Q8_0", "--plan", str(plan), "--overwrite"]) == 1
    assert "is one for Q4_K_M" in capsys.readouterr().err
    assert run(["quantize", str(tiny.path), two, "--plan", str(plan), "--pure", "--overwrite"]) == 1
    assert "--plan with other choices" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["Q4_K_M"], ["out.gguf", "Q4_K_M", "--tensor-type", "attn_v"], ["--dry-run"]])
def test_words_that_are_missing_are_wrong_usage(tiny, tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    assert run(["quantize", str(tiny.path), *words]) == 2
    assert "Usage" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# -- families that only llama.cpp computes ------------------------------------------------------------------------


def test_a_family_that_edgelora_does_not_compute_is_held_against_its_source(make_tiny, tmp_path):
    """llama.cpp's own type choice, and a check in llama.cpp alone, which says so and still finds what is wrong."""
    tiny = make_tiny(tied=False)
    source, out = tmp_path / "source.gguf", tmp_path / "out.gguf"
    source.write_bytes(renamed(tiny.path, "xverse"))
    done = quantize(source, out, "Q4_K_M")
    assert done.plan.types == quantize(tiny.path, tmp_path / "own.gguf", "Q4_K_M").plan.types
    found = done.certificate.compared
    assert (found.fidelity, found.equal_ids, found.equal_text, found.equal_ends) == (None, 12, 8, 8)
    assert found.loss.kl_mean > 1e-3
    assert any("a model of the architecture xverse: it is not checked against torch" in note for note in done.notes)
    assert json.loads(GGUFFile(out).get(CERTIFICATE_KEY, str))["fidelity"] is None
    again = certify_foreign(source, source, None)
    assert (again.compared.loss.kl_mean, again.compared.loss.same_top) == (0.0, 1.0)
    other = tmp_path / "other.gguf"
    other.write_bytes(renamed(make_tiny(tied=False, seed=7).path, "xverse"))
    assert certify_foreign(other, source, None).faults[0].startswith("against what it was made from: mean KL")
