"""Importance matrices: llama.cpp's format, and what llama-imatrix would collect on the same tokens."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest

from converters.imatrix import Importance, read_importance, write_importance
from edgelora.errors import ExportError, FileFormatError


def example() -> Importance:
    """A dense tensor of 8 columns, and three experts of 4, one of which saw nothing."""
    sums = {
        "blk.0.ffn_up.weight": np.arange(8, dtype=np.float32)[None],
        "blk.0.ffn_up_exps.weight": np.array([[2, 4, 6, 8], [0, 0, 0, 0], [3, 3, 3, 0]], np.float32),
    }
    counts = {"blk.0.ffn_up.weight": np.array([4]), "blk.0.ffn_up_exps.weight": np.array([2, 0, 3])}
    return Importance(sums, counts, 2, 512, ("rows.jsonl", "general.txt"))


def equal(a: Importance, b: Importance) -> bool:
    return (
        (a.chunks, a.chunk_tokens, a.datasets) == (b.chunks, b.chunk_tokens, b.datasets)
        and a.sums.keys() == b.sums.keys()
        and all(np.array_equal(a.sums[n], b.sums[n]) and np.array_equal(a.counts[n], b.counts[n]) for n in a.sums)
    )


# -- the format ------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_again(tmp_path):
    write_importance(tmp_path / "a.gguf", example())
    assert equal(read_importance(tmp_path / "a.gguf"), example())


def test_weights_are_means_and_an_unseen_expert_counts_one():
    weights = example().weights()
    assert weights["blk.0.ffn_up.weight"].tolist() == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]
    assert weights["blk.0.ffn_up_exps.weight"].tolist() == [1, 2, 3, 4, 1, 1, 1, 1, 1, 1, 1, 0]
    assert {w.dtype for w in weights.values()} == {np.dtype(np.float32)}
    assert example().unseen() == {"blk.0.ffn_up_exps.weight": 1}


def write_gguf(path, tensors, kind="imatrix", **keys):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(kind)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    for key, value in keys.items():
        writer.add_key_value(f"imatrix.{key}", value, gguf.GGUFValueType.STRING)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def pair(sums, counts, dtype=np.float32):
    return {"a.in_sum2": np.array(sums, dtype), "a.counts": np.array(counts, np.float32)}


@pytest.mark.parametrize(
    ("tensors", "fault"),
    [
        ({"other": np.ones(4, np.float32)}, "holds no tensors"),
        (pair([1, np.nan], [3]), "a has sums of squares that are negative or not finite"),
        (pair([1, np.inf], [3]), "a has sums of squares that are negative or not finite"),
        (pair([1, -1], [3]), "a has sums of squares that are negative or not finite"),
        (pair([1, 2], [0]), "a was computed on 0 tokens"),
        (pair([[1, 2], [3, 4]], [[3], [-1]]), "a was computed on -1 tokens"),
        (pair([[1, 2], [3, 4]], [[3], [0]]), "sums for an expert that saw no token"),
        (pair([1, 2], [np.nan]), "no number of tokens"),
        (pair([1, 2], [1e30]), "no number of tokens"),
        (pair([1, 2, 3], [1, 2]), "a has 3 sums and 2 counts"),
        (pair([1, 2], [3], np.float16), "stored as F16, expected F32"),
        ({"a.in_sum2": np.ones(4, np.float32)}, "a.in_sum2 stands without its other half"),
        ({"a.counts": np.ones(1, np.float32)}, "a.counts stands without its other half"),
    ],
)
def test_what_no_activations_can_have_is_refused(tmp_path, tensors, fault):
    write_gguf(tmp_path / "a.gguf", tensors)
    with pytest.raises(FileFormatError) as error:
        read_importance(tmp_path / "a.gguf")
    assert fault in str(error.value)


def test_another_kind_of_file_is_refused(tmp_path, tiny):
    with pytest.raises(FileFormatError, match="not a usable importance matrix") as error:
        read_importance(tiny.path)
    assert error.value.why == "it is a GGUF of the type 'model'"
    write_gguf(tmp_path / "a.gguf", pair([1, 2], [3]), chunk_count="two")
    with pytest.raises(FileFormatError, match="not a usable GGUF"):
        read_importance(tmp_path / "a.gguf")
    with pytest.raises(FileFormatError, match="no such file"):
        read_importance(tmp_path / "missing.dat")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole, cut = tmp_path / "whole.gguf", tmp_path / "cut.gguf"
    write_importance(whole, example())
    data = whole.read_bytes()
    end = len(data) - 28  # the last 4 bytes are a count, padded to 32
    for n in range(0, end, 7):
        cut.write_bytes(data[:n])
        with pytest.raises(FileFormatError):
            read_importance(cut)


def test_a_matrix_of_another_model_is_refused():
    shapes = {"blk.0.ffn_up.weight": (6, 8), "blk.0.ffn_up_exps.weight": (3, 6, 4), "other": (2, 2)}
    example().check(shapes)
    with pytest.raises(ExportError) as error:
        example().check({"blk.0.ffn_up_exps.weight": (2, 6, 4)})
    assert str(error.value).splitlines() == [
        "the importance matrix does not fit the model: blk.0.ffn_up.weight is no tensor of the model; "
        "blk.0.ffn_up_exps.weight has 12 columns, the model's 8",
        "  why: it was computed on another model",
        "  fix: compute it on this one: `edgelora imatrix MODEL --data ROWS --out FILE`",
    ]


def legacy(entries, trailer=True) -> bytes:
    """The format before GGUF, as llama-imatrix writes it: means times a number of calls."""
    out = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        raw = name.encode()
        out += struct.pack("<i", len(raw)) + raw + struct.pack("<ii", calls, len(values))
        out += np.array(values, np.float32).tobytes()
    return out + (struct.pack("<ii", 7, 5) + b"a.txt" if trailer else b"")


@pytest.mark.parametrize("trailer", [True, False])
def test_the_format_before_gguf_is_read(tmp_path, trailer):
    (tmp_path / "old.dat").write_bytes(legacy([("a", 2, [4, 0, 1]), ("b", 1, [5])], trailer))
    found = read_importance(tmp_path / "old.dat")
    assert {name: w.tolist() for name, w in found.weights().items()} == {"a": [2, 0, 0.5], "b": [5]}
    assert (found.chunks, found.datasets) == ((7, ("a.txt",)) if trailer else (0, ()))


@pytest.mark.parametrize("damage", ["cut", "calls", "count", "entries", "nan"])
def test_a_damaged_file_of_that_format_is_refused(tmp_path, damage):
    whole = legacy([("a", 2, [4, 0, 1])], trailer=False)
    huge = struct.pack("<i", 2**31 - 1)
    (tmp_path / "old.dat").write_bytes({
        "cut": whole[:-1],
        "calls": whole[:9] + struct.pack("<i", -1) + whole[13:],
        "count": whole[:13] + huge + whole[17:],
        "entries": huge + whole[4:],
        "nan": legacy([("a", 2, [np.nan])]),
    }[damage])  # fmt: skip
    with pytest.raises(FileFormatError, match="not a usable importance matrix"):
        read_importance(tmp_path / "old.dat")
