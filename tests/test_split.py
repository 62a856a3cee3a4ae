"""A model in several GGUF files is one model: split by llama.cpp's own writer, opened by any part of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type
from test_export import llama_logits, make_adapter, torch_logits
from test_merge import saved, tensors, write

from converters.metadata import copy_metadata
from edgelora.base.model import open_base
from edgelora.errors import BaseModelError, FileFormatError
from edgelora.files.gguf import GGUFFile
from edgelora.files.split import open_gguf


def split(path: Path, folder: Path, per_part: int = 8) -> list[Path]:
    """Write the model at `path` in parts of `per_part` tensors with gguf-py; returns their paths."""
    source = GGUFFile(path)
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "tiny.gguf", source.architecture, split_max_tensors=per_part)
    copy_metadata(source, writer)
    for name, info in source.tensors.items():
        rows = source.rows(name)
        floats = info.type == Type.F32
        writer.add_tensor(name, rows.view(np.float32).reshape(info.shape) if floats else rows, raw_dtype=info.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.iterdir())


@pytest.fixture
def parts(tiny, tmp_path) -> list[Path]:
    return split(tiny.path, tmp_path / "parts")


def test_any_part_opens_all_of_it(tiny, parts):
    assert [path.name for path in parts] == [f"tiny-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    whole = GGUFFile(tiny.path)
    for path in parts:
        found = open_gguf(path)
        assert found.path == parts[0]
        assert found.files == tuple(parts)
        assert found.size_bytes == sum(part.stat().st_size for part in parts)
        assert {n: (t.shape, t.type) for n, t in found.tensors.items()} == {
            n: (t.shape, t.type) for n, t in whole.tensors.items()
        }
        for name in whole.tensors:
            np.testing.assert_array_equal(found.rows(name), whole.rows(name), err_msg=name)
            found.forget(name)
            np.testing.assert_array_equal(found.rows(name), whole.rows(name), err_msg=name)


def test_it_is_the_same_base_and_computes_the_same(tiny, parts):
    base, whole = open_base(parts[0].parent), open_base(tiny.path)
    assert base.identity == whole.identity
    assert base.base_file.sha256 != whole.base_file.sha256  # of all parts together
    np.testing.assert_array_equal(torch_logits(base), torch_logits(whole))
    np.testing.assert_array_equal(llama_logits(base.path), llama_logits(tiny.path))


@pytest.mark.parametrize("kind", [Type.F32, Type.Q4_0])
@pytest.mark.parametrize("quant", ["F16", "Q4_K_M"])
def test_merging_into_parts_is_merging_into_the_whole(make_tiny, tmp_path, kind, quant):
    whole = make_tiny(kind).path
    parts = split(whole, tmp_path / "parts")
    mine = saved(tmp_path / "mine", make_adapter(open_base(whole)))
    write(parts[1], [(mine, 1.0)], tmp_path / "a.gguf", quant)
    write(whole, [(mine, 1.0)], tmp_path / "b.gguf", quant)
    assert tensors(tmp_path / "a.gguf") == tensors(tmp_path / "b.gguf")
    assert not [key for key in GGUFFile(tmp_path / "a.gguf").metadata if key.startswith("split.")]


def test_what_is_not_all_there_is_said(parts, tmp_path):
    parts[1].rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(FileFormatError) as fault:
        open_gguf(parts[2])
    assert str(fault.value).splitlines() == [
        f"{parts[0]}: not a usable GGUF file",
        "  why: 1 of its 3 parts are missing: tiny-00002-of-00003.gguf",
        "  fix: download the others too",
    ]
    parts[0].rename(tmp_path / "first.gguf")
    with pytest.raises(FileFormatError, match="one part of a model in 3 files"):
        open_gguf(parts[2])
    with pytest.raises(FileFormatError, match="its name does not say so"):
        open_gguf(tmp_path / "first.gguf")


def test_a_part_of_another_model_is_not_taken(make_tiny, parts, tmp_path):
    shutil.copyfile(parts[2], parts[1])
    with pytest.raises(FileFormatError, match="does not say that it is part 2 of 3"):
        open_gguf(parts[0])
    others = split(make_tiny().path, tmp_path / "others", per_part=7)
    assert len(others) == 3
    shutil.copyfile(others[1], parts[1])
    with pytest.raises(FileFormatError, match="its parts hold 19 tensors"):
        open_gguf(parts[0])


def test_two_models_in_a_folder_are_still_two(tiny, parts):
    shutil.copyfile(tiny.path, parts[0].with_name("other.gguf"))
    with pytest.raises(BaseModelError, match="2 models in this folder"):
        open_base(parts[0].parent)
