"""Our safetensors reader against the library's own on whole files, and against broken ones by itself."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from edgelora.errors import FileFormatError
from edgelora.files.safetensors import DTYPE_BITS, MAX_HEADER_BYTES, SafetensorsFile, StoredTensor, read_floats


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


def test_the_file_is_listed_as_safetensors_lists_it(tmp_path):
    path = tmp_path / "file.safetensors"
    save_file(
        {"b": torch.zeros(2, 3), "a": torch.zeros(5, dtype=torch.int64)}, path, metadata={"format": "pt", "é": "✓"}
    )
    ours = SafetensorsFile(path)
    with safe_open(path, "pt") as theirs:
        assert ours.metadata == theirs.metadata()
        assert set(ours.tensors) == set(theirs.keys())
        for name in theirs.keys():  # noqa: SIM118  # not a mapping
            part = theirs.get_slice(name)
            found = ours.tensors[name]
            assert (found.name, found.dtype, list(found.shape)) == (name, part.get_dtype(), part.get_shape())
    assert ours.path == path
    assert ours.size_bytes == path.stat().st_size


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_of_the_format_is_listed(tmp_path, dtype):
    header = {"t": entry(dtype, [8, 2], [0, 2 * DTYPE_BITS[dtype]])}
    path = write(tmp_path, header, bytes(2 * DTYPE_BITS[dtype]))
    data_start = path.stat().st_size - 2 * DTYPE_BITS[dtype]
    assert SafetensorsFile(path).tensors["t"] == StoredTensor("t", dtype, (8, 2), data_start, 2 * DTYPE_BITS[dtype])
    with safe_open(path, "np") as theirs:  # the library knows it, at this size
        assert list(theirs.keys()) == ["t"]


ROWS = {(): (1, 4), (5,): (1, 20), (3, 5): (3, 20), (2, 3, 4): (6, 16), (0, 4): (0, 16), (4, 0): (4, 0)}


@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_rows_run_along_the_last_dimension(tmp_path, shape):
    values = np.arange(np.prod(shape), dtype="<f4").reshape(shape)
    header = {"t": entry(shape=shape, offsets=[0, values.nbytes])}
    rows = SafetensorsFile(write(tmp_path, header, values.tobytes())).rows("t")
    assert rows.shape == ROWS[shape]
    assert rows.dtype == np.uint8
    assert rows.tobytes() == values.tobytes()


def test_a_file_of_a_terabyte_is_opened_and_mapped_by_its_header_alone(tmp_path):
    path = write(tmp_path, {"t": entry("BF16", [1 << 19, 1 << 20], [0, 1 << 40])})
    with path.open("r+b") as f:  # a hole: no disk space is used
        f.truncate(path.stat().st_size + (1 << 40))
    tracemalloc.start()
    file = SafetensorsFile(path)
    last = file.rows("t")[-1, -1]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (last, file.rows("t").shape) == (0, (1 << 19, 2 << 20))
    assert peak < 1 << 16


def test_integers_are_listed_and_not_read(tmp_path):
    file = SafetensorsFile(write(tmp_path, {"t": entry("I64", [1])}, bytes(8)))
    with pytest.raises(FileFormatError, match="tensor t is of type I64, not F32, F16 or BF16"):
        file.rows("t")


@pytest.mark.parametrize("metadata", [None, {}, {"a": "1"}])
def test_metadata_may_be_missing_or_empty(tmp_path, metadata):
    assert SafetensorsFile(write(tmp_path, {"__metadata__": metadata})).metadata == (metadata or {})
    assert SafetensorsFile(write(tmp_path, {})).metadata == {}


def whole(**fields: object) -> bytes:
    """The header of one tensor as text, with fields replaced by what they should not be."""
    return json.dumps({"t": entry() | fields}).encode()


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
    "shapes beyond numpy": ({"t": entry(shape=[0, 1 << 62, 1 << 62], offsets=[0, 0])}, None, "does not lie inside"),
    "booleans for numbers": ({"t": entry(shape=[True], offsets=[False, True])}, None, "does not lie inside"),
    "null for a shape": ({"t": entry(shape=None)}, None, "does not lie inside"),
    "offsets in a table": ({"t": entry(offsets={"0": 0, "8": 8})}, None, "does not lie inside"),
    "an unknown type": ({"t": entry("F128")}, None, "of the unknown type 'F128'"),
    "half a byte": ({"t": entry("F4", [1], [0, 0])}, None, "does not lie inside"),
    "two tensors over the same bytes": ({"t": entry(), "u": entry()}, None, "tensor u overlaps the one before it"),
    "a hole": ({"t": entry(shape=[1], offsets=[4, 8])}, None, "tensor t leaves a hole before it"),
    "bytes at the end": ({"t": entry(shape=[1], offsets=[0, 4])}, None, "4 bytes at its end belong to no tensor"),
    "a tensor twice": (b'{"t": 1, "t": ' + json.dumps(entry()).encode() + b"}", None, "a name stands twice"),
    "a field twice": (whole().replace(b'"shape"', b'"dtype": "F32", "shape"'), None, "twice"),
    "two metadata": (b'{"__metadata__": {}, "__metadata__": {}}', None, "a name stands twice"),
    "a name of nothing": ({"": entry()}, None, "the tensor name '' is empty"),
    "a name with NUL": ({"a\0": entry()}, None, r"the tensor name 'a\x00' is empty, too long or not printable"),
    "a name that moves the cursor": ({"\x1b[2J": entry()}, None, r"'\x1b[2J' is empty, too long or not printable"),
    "half a surrogate pair": (b'{"\\ud800": ' + json.dumps(entry()).encode() + b"}", None, r"'\ud800' is empty"),
    "a long name": ({"n" * 1001: entry()}, None, "empty, too long or not printable"),
    "metadata that is a list": ({"__metadata__": ["a"], "t": entry()}, None, "no table of texts"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "t": entry()}, None, "no table of texts"),
    "metadata of half a pair": (b'{"__metadata__": {"a": "\\udc00"}}', None, "no table of texts"),
    "UTF-16": (whole().decode().encode("utf-16"), None, "not JSON"),
    "text behind the header": (whole() + b"\0", None, "not JSON"),
    "a number of 5000 digits": (b'{"t": 1' + b"0" * 5000 + b"}", None, "not JSON"),
    "many values": (b'{"a": [' + b"[]," * (3 << 19) + b"0]}", None, "more values than any real one"),
    "many tensors": (json.dumps({f"{i}": 0 for i in range(65_537)}).encode(), None, "65537 tensors"),
    "a header too long": (b"{" + b" " * MAX_HEADER_BYTES + b"}", None, "8388610 bytes (at most 8388608 are read)"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_a_typed_error(tmp_path, case):
    header, length, why = BROKEN[case]
    path = write(tmp_path, header, bytes(8), length)
    with pytest.raises(FileFormatError) as caught:
        SafetensorsFile(path).rows("t")
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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(FileFormatError, match="no regular file"):
        SafetensorsFile(tmp_path / "pipe.safetensors")


def test_a_git_lfs_pointer_is_called_by_its_name(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(FileFormatError, match="git lfs pull"):
        SafetensorsFile(path)
