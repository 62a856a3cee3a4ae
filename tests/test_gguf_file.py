"""Our GGUF reader against gguf-py's on whole files, and against broken ones by itself."""

from __future__ import annotations

import itertools
import os
import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelora.errors import EdgeloraError, FileFormatError, OutputError
from edgelora.files.gguf import NEVER_IN_FILES, GGUFFile, Strings
from edgelora.files.reserved import fill_reserved, reserve

V = GGUFValueType
F32 = GGMLQuantizationType.F32
READABLE = [kind for kind in GGMLQuantizationType if kind not in NEVER_IN_FILES]
REMOVED = (4, 5, 31, 32, 33, 36, 37, 38)  # Q4_2, Q4_3 and the rows interleaved for ARM


# -- a file by hand, so that every part of it can be made wrong ---------------------------------------------------


def string(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, payload: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + payload


def array(item: int, n: int, payload: bytes = b"") -> bytes:
    return struct.pack("<IQ", item, n) + payload


def tensor(name: str | bytes, dims: Sequence[int], kind: int = F32, offset: int = 0) -> bytes:
    """`dims` as the file has them: the row's length first."""
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def build(
    keys: Sequence[bytes] = (), tensors: Sequence[bytes] = (), data: bytes = b"", *,
    magic: bytes = b"GGUF", version: int = 3, n_keys: int | None = None, n_tensors: int | None = None,
) -> bytes:  # fmt: skip
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    n_keys = len(keys) if n_keys is None else n_keys
    head = magic + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


TEXT = key("general.architecture", V.STRING, string("llama"))
NUMBER = key("llama.block_count", V.UINT32, struct.pack("<I", 2))
WORDS = key("words", V.ARRAY, array(V.STRING, 3, string("one") + string("") + string("drei ✓")))
GOOD = build([TEXT, NUMBER, WORDS], [tensor("a", [8, 2]), tensor("b", [8], offset=64)], bytes(range(96)))


def open_bytes(folder: Path, raw: bytes) -> GGUFFile:
    path = folder / "file.gguf"
    path.write_bytes(raw)
    return GGUFFile(path)


# -- the oracle ---------------------------------------------------------------------------------------------------


def test_every_tensor_type_is_read_as_gguf_py_reads_it(tmp_path):
    path = tmp_path / "types.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    draw = np.random.default_rng(0)
    for kind in READABLE:
        block, size = GGML_QUANT_SIZES[kind]
        rows = draw.integers(0, 256, (3, size * 512 // block), dtype=np.uint8)
        writer.add_tensor(f"of.{kind.name}", rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for t in theirs.tensors:
        found = ours.tensors[t.name]
        assert (found.type, found.size_bytes, found.offset) == (t.tensor_type, t.n_bytes, t.data_offset)
        assert found.shape == tuple(t.shape[::-1].tolist())
        assert ours.rows(t.name).tobytes() == t.data.tobytes()


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4), (2, 1, 3, 4)], ids=len)
def test_shapes_are_numpy_order(tmp_path, shape):
    path = tmp_path / "shape.gguf"
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(path)
    assert file.tensors["t"].shape == shape
    assert file.tensors["t"].elements == values.size
    assert file.rows("t").shape == (values.size // shape[-1], shape[-1] * 4)
    assert np.array_equal(file.rows("t").view(np.float32).reshape(shape), values)


VALUES = {
    V.UINT8: 200, V.INT8: -100, V.UINT16: 65_535, V.INT16: -32_768, V.UINT32: 2**32 - 1, V.INT32: -(2**31),
    V.FLOAT32: 0.5, V.BOOL: True, V.STRING: "naïve ✓\x00\n", V.UINT64: 2**64 - 1, V.INT64: -(2**63), V.FLOAT64: 1e300,
}  # fmt: skip


def test_metadata_is_what_gguf_py_wrote_and_reads(tmp_path):
    path = tmp_path / "keys.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for kind, value in VALUES.items():
        writer.add_key_value(f"one.{kind.name}", value, kind)
        writer.add_key_value(f"many.{kind.name}", [value, value], V.ARRAY, sub_type=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    assert list(ours.metadata) == [k for k in theirs.fields if not k.startswith("GGUF.")]
    for kind, value in VALUES.items():
        one, many = ours.metadata[f"one.{kind.name}"], ours.metadata[f"many.{kind.name}"]
        assert (one.type, one.data, type(one.data)) == (kind, value, type(value))
        assert one.data == theirs.fields[f"one.{kind.name}"].contents()
        assert (many.type, many.item, list(many.data)) == (V.ARRAY, kind, [value, value])
        assert list(many.data) == list(theirs.fields[f"many.{kind.name}"].contents())


def test_the_tiny_model_is_read_as_gguf_py_reads_it(tiny):
    ours, theirs = GGUFFile(tiny.path), gguf.GGUFReader(tiny.path)
    for name, value in ours.metadata.items():
        field = theirs.fields[name]
        data = value.data if isinstance(value.data, str | int | float) else list(value.data)
        assert data == field.contents()
    assert {n: t.offset for n, t in ours.tensors.items()} == {t.name: t.data_offset for t in theirs.tensors}
    assert ours.architecture == "llama"


# -- exact bytes --------------------------------------------------------------------------------------------------


def test_a_file_by_hand(tmp_path):
    file = open_bytes(tmp_path, GOOD)
    assert file.get("llama.block_count", int) == 2
    assert file.rows("a").tobytes() == bytes(range(64))
    assert file.rows("b").tobytes() == bytes(range(64, 96))


def test_version_2_is_read_like_version_3(tmp_path):
    assert open_bytes(tmp_path, GOOD[:4] + struct.pack("<I", 2) + GOOD[8:]).get("general.architecture", str) == "llama"


def test_strings(tmp_path):
    words = open_bytes(tmp_path, GOOD).get("words", list)
    assert isinstance(words, Strings)
    assert (len(words), list(words), words[2], words[-1]) == (3, ["one", "", "drei ✓"], "drei ✓", "drei ✓")
    assert words[:2] == ["one", ""]
    assert words.raw(2) == "drei ✓".encode()
    assert "one" in words
    with pytest.raises(IndexError):
        words[3]


def test_a_string_of_an_array_may_be_any_bytes(tmp_path):
    keys = [key("words", V.ARRAY, array(V.STRING, 1, string(b"\xff\x00a")))]
    words = open_bytes(tmp_path, build(keys)).get("words", list)
    assert (words.raw(0), words[0]) == (b"\xff\x00a", "\ufffd\x00a")


def test_every_string_of_a_long_array_is_where_it_should_be(tmp_path):
    texts = [str(i) * (i % 5) for i in range(10_000)]
    keys = [key("words", V.ARRAY, array(V.STRING, len(texts), b"".join(string(t) for t in texts))), NUMBER]
    file = open_bytes(tmp_path, build(keys))
    words = file.get("words", list)
    assert list(words) == texts
    assert [words[i] for i in (0, 4095, 4096, 9_999)] == [texts[i] for i in (0, 4095, 4096, 9_999)]
    assert file.get("llama.block_count", int) == 2  # what stands behind the array


def test_an_empty_array_and_a_file_without_tensors(tmp_path):
    file = open_bytes(tmp_path, build([key("none", V.ARRAY, array(V.STRING, 0)), key("no", V.ARRAY, array(V.INT8, 0))]))
    assert (len(file.get("none", list)), len(file.get("no", list)), file.tensors) == (0, 0, {})


def test_alignment_is_taken_from_the_file(tmp_path):
    keys = [key("general.alignment", V.UINT32, struct.pack("<I", 64))]
    raw = build(keys, [tensor("a", [1]), tensor("b", [1], offset=64)])
    raw += bytes(-len(raw) % 64) + b"AAAA" + bytes(60) + b"BBBB"
    file = open_bytes(tmp_path, raw)
    assert (file.rows("a").tobytes(), file.rows("b").tobytes()) == (b"AAAA", b"BBBB")


def test_fill_reserved_changes_its_own_bytes_only(tmp_path):
    path, room = tmp_path / "file.gguf", reserve(40)
    raw = build([TEXT, key("note", V.STRING, string(room)), NUMBER], [tensor("a", [8])], bytes(range(32)))
    path.write_bytes(raw)
    fill_reserved(path, "note", '{"ok": "✓"}')
    assert path.read_bytes() == raw.replace(room.encode(), '{"ok": "✓"}'.encode().ljust(40))
    assert GGUFFile(path).get("note", str).rstrip() == '{"ok": "✓"}'


def test_fill_reserved_refuses_what_does_not_fit(tmp_path):
    path = tmp_path / "file.gguf"
    raw = build([key("note", V.STRING, string(reserve(4)))])
    path.write_bytes(raw)
    with pytest.raises(OutputError, match="5 bytes do not fit into the 4 reserved"):
        fill_reserved(path, "note", "12345")
    assert path.read_bytes() == raw


# -- broken files -------------------------------------------------------------------------------------------------

BROKEN = {
    "magic": (b"GGML" + GOOD[4:], "letters GGUF"),
    "version 1": (build([TEXT], version=1), "version 1"),
    "big-endian": (build([TEXT], version=0x03000000), "version 50331648"),
    "2^60 keys": (build([TEXT], n_keys=1 << 60), "1152921504606846976 keys and 0 tensors, more than it can hold"),
    "2^60 tensors": (build([TEXT], n_tensors=1 << 60), "1 keys and 1152921504606846976 tensors, more than it can hold"),
    "key of 2^62 bytes": (build([struct.pack("<Q", 1 << 62) + bytes(60)]), "a name of 4611686018427387904 bytes"),
    "key of 64 KiB": (build([key("k" * 65_536, V.BOOL, b"\1")]), "a name of 65536 bytes"),
    "string of 2^62": (build([key("k", V.STRING, struct.pack("<Q", 1 << 62) + bytes(60))]), "a text of 46116860184273"),
    "string past the end": (build([key("k", V.STRING, struct.pack("<Q", 200) + bytes(60))]), "in the middle of its"),
    "string not UTF-8": (build([key("k", V.STRING, string(b"\xff"))]), "a text that is not UTF-8"),
    "array of 2^40": (build([key("k", V.ARRAY, array(V.UINT8, 1 << 40))]).ljust(113, b"\0"), "1099511627776 elements"),
    "array of 2^40 strings": (build([key("k", V.ARRAY, array(V.STRING, 1 << 40))]).ljust(113, b"\0"), "strings"),
    "string in an array past the end": (
        build([key("k", V.ARRAY, array(V.STRING, 1, struct.pack("<Q", 1 << 62)))]), "past the end",
    ),
    "strings whose lengths add up to 2^64": (
        build([key("k", V.ARRAY, array(V.STRING, 3, struct.pack("<Q", (1 << 63) - 64) * 3))]), "past the end",
    ),
    "nested array": (build([key("k", V.ARRAY, array(V.ARRAY, 1, array(V.UINT8, 1, b"\0")))]), "array of arrays"),
    "value type 13": (build([key("k", 13, bytes(8))]), "unknown type 13"),
    "array of type 13": (build([key("k", V.ARRAY, array(13, 1, bytes(8)))]), "unknown type 13"),
    "key twice": (build([NUMBER, NUMBER]), "llama.block_count stands in it twice"),
    "key not UTF-8": (build([string(b"\xff\xfe") + struct.pack("<IB", V.BOOL, 1)]), "a name that is not UTF-8"),
    "key of no bytes": (build([key("", V.BOOL, b"\1")]), "the name '' is empty or cannot be printed"),
    "key with NUL": (build([key("a\0b", V.BOOL, b"\1")]), r"the name 'a\x00b' is empty or cannot be printed"),
    "key that moves the cursor": (build([key("\x1b[2J", V.BOOL, b"\1")]), r"the name '\x1b[2J' is empty or cannot be"),
    "architecture as number": (
        build([key("general.architecture", V.UINT32, bytes(4))]), "general.architecture is a UINT32, expected STRING",
    ),
    "type as array": (
        build([key("general.type", V.ARRAY, array(V.STRING, 0))]), "general.type is a ARRAY, expected STRING",
    ),
    "tensor with NUL": (build([], [tensor("a\0", [8])], bytes(32)), r"the name 'a\x00' is empty or cannot be printed"),
    "tensor without name": (build([], [tensor("", [8])], bytes(32)), "the name '' is empty or cannot be printed"),
    "tensor twice": (build([], [tensor("a", [8]), tensor("a", [8], offset=32)], bytes(64)), "a stands in it twice"),
    "5 dimensions": (build([], [tensor("a", [1] * 5)], bytes(32)), "5 dimensions"),
    "no dimensions": (build([], [tensor("a", [])], bytes(32)), "0 dimensions"),
    "a dimension of zero": (build([], [tensor("a", [8, 0])], bytes(32)), "impossible shape"),
    "dimensions that overflow": (build([], [tensor("a", [1 << 32, 1 << 32])], bytes(32)), "impossible shape"),
    "tensor type 2^31": (build([], [tensor("a", [32], 1 << 31)], bytes(32)), "unknown type"),
    "half a block": (build([], [tensor("a", [16], GGMLQuantizationType.Q8_0)], bytes(34)), "do not divide"),
    "unaligned": (build([], [tensor("a", [8], offset=4)], bytes(64)), "begins at 4, expected 0"),
    "overlapping": (build([], [tensor("a", [16]), tensor("b", [8], offset=32)], bytes(96)), "expected 64"),
    "a hole": (build([], [tensor("a", [8]), tensor("b", [8], offset=64)], bytes(96)), "expected 32"),
    "past the end": (build([], [tensor("a", [8])], bytes(28)), "cut short"),
    "offset of 2^63": (build([], [tensor("a", [8], offset=1 << 63)], bytes(32)), "expected 0"),
    "a tensor name of 64 bytes": (build([], [tensor("n" * 64, [8])], bytes(32)), "a name of 64 bytes"),
    "alignment 0": (build([key("general.alignment", V.UINT32, struct.pack("<I", 0))]), "general.alignment is 0"),
    "alignment 24": (build([key("general.alignment", V.UINT32, struct.pack("<I", 24))]), "general.alignment is 24"),
    "alignment -8": (build([key("general.alignment", V.INT32, struct.pack("<i", -8))]), "is a INT32, expected UINT32"),
    "alignment 2^31": (build([key("general.alignment", V.UINT32, struct.pack("<I", 1 << 31))]), "general.alignment"),
    "alignment as text": (build([key("general.alignment", V.STRING, string("32"))]), "is a STRING, expected UINT32"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_a_typed_error(tmp_path, case):
    raw, why = BROKEN[case]
    with pytest.raises(FileFormatError) as caught:
        open_bytes(tmp_path, raw)
    assert why in caught.value.why
    assert caught.value.what == f"{tmp_path / 'file.gguf'}: not a usable GGUF file"
    assert caught.value.fix


@pytest.mark.parametrize("kind", REMOVED)
def test_a_type_that_ggml_removed_is_a_typed_error(tmp_path, kind):
    with pytest.raises(FileFormatError, match=f"tensor a has the unknown type {kind}"):
        open_bytes(tmp_path, build([], [tensor("a", [256], kind)], bytes(512)))


@pytest.mark.parametrize("kind", NEVER_IN_FILES)
def test_a_type_that_never_stands_in_a_file_is_a_typed_error(tmp_path, kind):
    block, size = GGML_QUANT_SIZES[kind]
    with pytest.raises(FileFormatError, match=f"tensor a is {kind.name}, which llama.cpp makes in memory only"):
        open_bytes(tmp_path, build([], [tensor("a", [block], kind)], bytes(size)))


@pytest.mark.parametrize("case", [name for name in BROKEN if "2^" in name])
def test_a_claim_costs_no_memory(tmp_path, case):
    tracemalloc.start()
    with pytest.raises(FileFormatError):
        open_bytes(tmp_path, BROKEN[case][0])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_what_costs_an_object_each_is_limited(tmp_path, monkeypatch):
    three = [key(str(i), V.ARRAY, array(V.STRING, 2, string("ab") * 2)) for i in range(3)]
    whole = build(three, [tensor(str(i), [8], offset=32 * i) for i in range(3)], bytes(96))
    for limit, just_enough in (("MAX_ENTRIES", 3), ("MAX_STRINGS", 6), ("MAX_TEXT_BYTES", 6)):
        with monkeypatch.context() as patch:
            patch.setattr(f"edgelora.files.gguf.{limit}", just_enough)
            assert len(open_bytes(tmp_path, whole).metadata) == 3
            patch.setattr(f"edgelora.files.gguf.{limit}", just_enough - 1)
            with pytest.raises(FileFormatError):
                open_bytes(tmp_path, whole)


def test_every_shorter_file_is_a_typed_error(tmp_path):
    for length in range(0, len(GOOD), 7):
        with pytest.raises(FileFormatError):
            open_bytes(tmp_path, GOOD[:length])


def test_the_tiny_model_cut_anywhere_in_its_header_is_a_typed_error(tmp_path, tiny):
    raw = tiny.path.read_bytes()[: min(t.offset for t in GGUFFile(tiny.path).tensors.values())]
    for length in range(0, len(raw), 7 * 41):  # every 7th byte of a header of 16 KB would take seconds
        with pytest.raises(FileFormatError):
            open_bytes(tmp_path, raw[:length])


ONE_OF_EACH = build([
    key("int", V.INT16, b"\1\0"), key("float", V.FLOAT64, bytes(8)), key("bool", V.BOOL, b"\1"),
    key("str", V.STRING, string("1")), key("list", V.ARRAY, array(V.STRING, 1, string("1"))),
])  # fmt: skip


@pytest.mark.parametrize("expected", [int, float, bool, str, list])
def test_get_gives_a_value_of_the_type_asked_for_only(tmp_path, expected):
    file = open_bytes(tmp_path, ONE_OF_EACH)
    right = {expected.__name__, "int"} if expected is float else {expected.__name__}  # 1 is a number, True is none
    for name in right:
        assert file.get(name, expected) is file.metadata[name].data
    for name in file.metadata.keys() - right:
        with pytest.raises(FileFormatError) as caught:
            file.get(name, expected)
        kind = file.metadata[name].type.name
        assert caught.value.why == f"metadata {name} is a {kind}, expected {expected.__name__}"
    assert file.get("missing", expected, "default") == "default"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_get_gives_finite_floats_only(tmp_path, value):
    file = open_bytes(tmp_path, build([key("x", V.FLOAT32, struct.pack("<f", value))]))
    with pytest.raises(FileFormatError, match=f"metadata x is {value}, expected float"):
        file.get("x", float)


@pytest.mark.parametrize("raw", [b"", b"GGUF", b"GGUF".ljust(23, b"\0")], ids=len)
def test_a_file_shorter_than_a_header(tmp_path, raw):
    with pytest.raises(FileFormatError) as caught:
        open_bytes(tmp_path, raw)
    assert caught.value.why == "the file is shorter than a GGUF header"


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(FileFormatError, match="no such file"):
        GGUFFile(tmp_path / "missing.gguf")
    with pytest.raises(FileFormatError, match="a folder or a device, not a file") as caught:
        GGUFFile(tmp_path)
    assert caught.value.fix == "pass a file"


OTHERS = {
    "model.safetensors": (b"\x40\0\0\0\0\0\0\0{", "it is one file of a Hugging Face folder", "pass its folder: "),
    "config.json": (b"{}", "it is one file of a Hugging Face folder", "pass its folder: "),
    "pointer.gguf": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer", "git lfs pull"),
    "pytorch_model.bin": (b"\x80\2}q\0.", "a pickle can run any code", "python -c "),
    "pointer.bin": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer", "git lfs pull"),
    "model.pt": (b"", "a pickle can run any code", "python -c "),
    "zip.gguf": (b"PK\3\4" + bytes(40), "a pickle can run any code", "python -c "),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_kind_of_file_is_called_by_its_name(tmp_path, name):
    raw, why, fix = OTHERS[name]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(FileFormatError) as caught:
        GGUFFile(tmp_path / name)
    assert name in caught.value.what
    assert why in caught.value.why
    assert fix in caught.value.fix


@pytest.mark.parametrize("name", ["model.bin", "model.safetensors"])
def test_a_gguf_is_one_whatever_its_name(tmp_path, name):
    (tmp_path / name).write_bytes(GOOD)
    assert GGUFFile(tmp_path / name).architecture == "llama"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(FileFormatError, match="a folder or a device, not a file"):
        GGUFFile(tmp_path / "pipe.gguf")


HEADER_BYTES = len(GOOD) - 96
edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "delete", "write"]), st.integers(0, HEADER_BYTES - 1), st.integers(0, 255)
    ),
    min_size=1,
    max_size=6,
)
counter = itertools.count()


@settings(max_examples=150, deadline=None)
@given(edits)
def test_an_edited_header_opens_or_is_a_typed_error(tmp_path_factory, changes):
    raw = bytearray(GOOD)
    for kind, at, byte in changes:
        if kind == "insert":
            raw.insert(at, byte)
        elif kind == "delete":
            del raw[at]
        else:
            raw[at] = byte if kind == "write" else raw[at] ^ (1 << byte % 8)
    path = tmp_path_factory.getbasetemp() / f"edited-{next(counter)}.gguf"
    path.write_bytes(raw)
    try:
        file = GGUFFile(path)
    except EdgeloraError:
        return
    finally:
        path.unlink()
    # what opened can be read to its end
    for name, info in file.tensors.items():
        assert file.rows(name).size == info.size_bytes
    for value in file.metadata.values():
        assert value.data is not None
        assert not isinstance(value.data, Strings) or len(list(value.data)) == len(value.data)
