"""Quantizing whole files: llama.cpp's choice of types, its very bytes, and what is refused before it is asked."""

from __future__ import annotations

import pytest
from gguf.constants import GGMLQuantizationType as Type

from converters.plan import QuantizeOptions, plan_types, read_plan, write_plan
from converters.quant_types import COPY, IMPORTANCE_TYPES, NEEDS_IMPORTANCE, QUANT_TYPES, requires_importance
from converters.quantize import write_quantized
from edgelora.errors import ConfigError, FileFormatError
from edgelora.files.gguf import GGUFFile

# Their tables take ggml seconds to build, whatever the size of the model.
SLOW = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")


@pytest.mark.parametrize("kind", [k for k in QUANT_TYPES if k not in NEEDS_IMPORTANCE])
def test_a_plan_is_what_llama_cpp_writes_to_the_byte(make_tiny, tmp_path, kind):
    source, out = make_tiny(Type.F32).path, tmp_path / "out.gguf"
    plan = plan_types(source, QuantizeOptions(kind))
    write_quantized(source, out, QuantizeOptions(kind))
    written = GGUFFile(out)
    assert {name: info.type for name, info in written.tensors.items()} == plan.types
    assert [t.name for t in plan.tensors] == list(written.tensors)
    assert out.stat().st_size == plan.file_bytes
    assert sum(info.size_bytes for info in written.tensors.values()) == plan.size_bytes


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


def test_a_plan_file_is_read_as_it_was_written_and_edited(tiny, tmp_path):
    plan = plan_types(tiny.path, QuantizeOptions("Q4_K_M"))
    write_plan(tmp_path / "plan.toml", plan)
    assert read_plan(tmp_path / "plan.toml") == plan
    text = (tmp_path / "plan.toml").read_text()
    edited = text.replace('"blk.0.attn_q.weight" = { type = "Q4_K"', '"blk.0.attn_q.weight" = { type = "Q8_0"')
    (tmp_path / "plan.toml").write_text(edited)
    assert read_plan(tmp_path / "plan.toml") == plan.with_types({"blk.0.attn_q.weight": Type.Q8_0})


def test_every_fault_of_a_plan_file_is_named(tiny, tmp_path):
    write_plan(tmp_path / "plan.toml", plan_types(tiny.path, QuantizeOptions("Q4_K_M")))
    text = (tmp_path / "plan.toml").read_text()
    text = text.replace('"Q4_K_M"', '"Q9"').replace(
        'attn_q.weight" = { type = "Q4_K"', 'attn_q.weight" = { type = "Q9"'
    )
    (tmp_path / "plan.toml").write_text(text)
    with pytest.raises(FileFormatError) as error:
        read_plan(tmp_path / "plan.toml")
    assert "kind is 'Q9'" in error.value.what
    assert "blk.0.attn_q.weight: Q9: no such type" in error.value.what
    assert "blk.1.attn_q.weight: Q9: no such type" in error.value.what


def test_a_bad_pattern_is_a_setting_that_cannot_be(tiny):
    with pytest.raises(ConfigError, match="no regular expression"):
        plan_types(tiny.path, QuantizeOptions("Q4_K_M", tensor_types=(("attn_(v", "Q8_0"),)))
