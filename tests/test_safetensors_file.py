"""Our safetensors reader against the library's own on whole files, and against broken ones by itself."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgelora.errors import FileFormatError
from edgelora.files.safetensors import read_floats


def write(folder: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "file.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_floats_are_those_of_safetensors(tmp_path, dtype):
    path, draw = tmp_path / "file.safetensors", torch.Generator().manual_seed(0)
    shapes = {"matrix": (3, 5), "vector": (7,), "scalar": (), "three": (2, 3, 4), "empty": (0, 4)}
    edges = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 6e-8, 65_504.0])
    tensors = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}
    save_file(tensors | {"edges": edges.to(dtype)}, path, metadata={"format": "pt"})
    ours, theirs = read_floats(path), load_file(path)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == np.float32
        assert ours[name].shape == tuple(value.shape)
        np.testing.assert_array_equal(ours[name], value.float().numpy())


def test_exact_bytes(tmp_path):
    path = write(tmp_path, {"__metadata__": {"format": "pt"}, "t": entry("BF16", [2, 1], [0, 4])}, b"\x80\x3f\x00\xc0")
    assert read_floats(path)["t"].tolist() == [[1.0], [-2.0]]


BROKEN = {
    "a length past the end": ({}, 1 << 60, "shorter than the header"),
    "a header of one byte": (b"1", 1, "shorter than the header"),
    "not JSON": (b"{'t': 1}", None, "not JSON"),
    "not UTF-8": (b'{"\xff": 1}', None, "not JSON"),
    "nested deeply": (b"[" * 200_000, None, "not JSON"),
    "a list": ([1, 2], None, "not a JSON object"),
    "integers": ({"t": entry("I64", [1], [0, 8])}, None, "of type I64, not F32, F16 or BF16"),
    "a type that is a list": ({"t": entry(["F32"])}, None, "does not lie inside"),
    "an entry that is a list": ({"t": [1]}, None, "does not lie inside"),
    "offsets outside": ({"t": entry(offsets=[8, 16])}, None, "does not lie inside"),
    "offsets of 2^62": ({"t": entry(offsets=[1 << 62, (1 << 62) + 8])}, None, "does not lie inside"),
    "negative offsets": ({"t": entry(offsets=[-8, 0])}, None, "does not lie inside"),
    "offsets backwards": ({"t": entry(offsets=[8, 0])}, None, "does not lie inside"),
    "three offsets": ({"t": entry(offsets=[0, 4, 8])}, None, "does not lie inside"),
    "offsets that are not whole": ({"t": entry(offsets=[0.0, 8.0])}, None, "does not lie inside"),
    "a shape too large": ({"t": entry(shape=[3])}, None, "does not lie inside"),
    "a shape too small": ({"t": entry(shape=[1])}, None, "does not lie inside"),
    "a shape of 2^62": ({"t": entry(shape=[1 << 62, 4])}, None, "does not lie inside"),
    "a negative shape": ({"t": entry(shape=[-1, -2])}, None, "does not lie inside"),
    "a shape that is not whole": ({"t": entry(shape=[2.5])}, None, "does not lie inside"),
    "an infinite shape": (b'{"t": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}}', None, "does not lie"),
    "a shape that is a text": ({"t": entry(shape="2")}, None, "does not lie inside"),
    "65 dimensions": ({"t": entry(shape=[2] + [1] * 64)}, None, "does not lie inside"),
    "nothing times 2^63": ({"t": entry(shape=[0, 1 << 63], offsets=[0, 0])}, None, "does not lie inside"),
    "two tensors over the same bytes": ({"t": entry(), "u": entry()}, None, ""),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_a_typed_error(tmp_path, case):
    header, length, why = BROKEN[case]
    path = write(tmp_path, header, bytes(8), length)
    with pytest.raises(FileFormatError) as caught:
        read_floats(path)
    assert caught.value.what == f"{path}: not a usable safetensors file"
    assert why in caught.value.why
    assert caught.value.fix


@pytest.mark.parametrize("missing", ["dtype", "shape", "data_offsets"])
def test_a_missing_field_is_a_typed_error(tmp_path, missing):
    whole = entry()
    del whole[missing]
    with pytest.raises(FileFormatError):
        read_floats(write(tmp_path, {"t": whole}, bytes(8)))


@pytest.mark.parametrize("length", range(0, 70, 7))
def test_a_shorter_file_is_a_typed_error(tmp_path, length):
    whole = write(tmp_path, {"t": entry()}, bytes(8)).read_bytes()
    assert length < len(whole)
    path = tmp_path / "short.safetensors"
    path.write_bytes(whole[:length])
    with pytest.raises(FileFormatError):
        read_floats(path)


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(FileFormatError, match="cannot be read"):
            read_floats(path)
