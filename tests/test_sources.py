"""Rows out of files of every kind: all of them, in order, with their places, and no more than one in memory."""

from __future__ import annotations

import csv
import errno
import gzip
import io
import json
import os
import random
import sys
import tracemalloc
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelora.data import json_stream, readers
from edgelora.data.json_stream import json_rows
from edgelora.data.readers import READERS
from edgelora.data.rows import Conversation, Document, Message, Preference, Rated, Tokenized
from edgelora.data.sources import files_of, read_rows
from edgelora.errors import DataError

ROWS = [{"instruction": f"question {i} ✓", "output": f"answer {i}"} for i in range(5)]
READ = [Conversation((Message("user", r["instruction"]), Message("assistant", r["output"]))) for r in ROWS]
DEEP = "[" * 100_000


def table(rows, delimiter=",", end="\r\n") -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


# name of a file → ROWS in it, and the numbers of the rows
TEXTS = {
    "rows.jsonl": ("\n".join(map(json.dumps, ROWS)), [1, 2, 3, 4, 5]),
    "windows.jsonl": ("\r\n\r\n".join(map(json.dumps, ROWS)), [1, 3, 5, 7, 9]),
    "rows": ("\n".join(map(json.dumps, ROWS)), [1, 2, 3, 4, 5]),
    "array.json": (json.dumps(ROWS, indent=1, ensure_ascii=False), [2, 6, 10, 14, 18]),
    "flat.json": (json.dumps(ROWS), [1] * 5),
    "object.json": ('{"version": 1, "tags": ["a", {"b": []}],\n"data": ' + json.dumps(ROWS) + ', "n": 5}', [2] * 5),
    "lines.json": ("\n".join(map(json.dumps, ROWS)), [1, 2, 3, 4, 5]),
    "rows.csv": (table(ROWS), [2, 3, 4, 5, 6]),
    "rows.tsv": (table(ROWS, "\t", "\n"), [2, 3, 4, 5, 6]),
}


def found(path: Path, **options):
    return [(row.place.number, row.row) for row in read_rows(path, **options)]


def refused(path: Path, **options) -> DataError:
    with pytest.raises(DataError) as caught:
        list(read_rows(path, **options))
    assert caught.value.why
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a mark"])
@pytest.mark.parametrize("zipped", [False, True], ids=["", "gz"])
@pytest.mark.parametrize("name", TEXTS)
def test_every_text_kind_gives_the_same_rows(tmp_path, name, zipped, mark):
    text, numbers = TEXTS[name]
    raw = mark + text.encode()
    path = tmp_path / (name + ".gz" * zipped)
    path.write_bytes(gzip.compress(raw) if zipped else raw)
    assert found(path) == list(zip(numbers, READ, strict=True))
    assert {row.place.path for row in read_rows(path)} == {path}


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pip install pyarrow")
    pq = pytest.importorskip("pyarrow.parquet", reason="pip install pyarrow")
    call = {"type": "function", "function": {"name": "f", "arguments": json.dumps({"on": True})}}
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": None},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}], "tools": "[]"},
    ]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1)
    (one, first), (two, second) = found(path)
    assert (one, two) == (1, 2)
    assert first == Conversation((Message("user", "a"), Message("assistant", "b")))
    assert second.messages[1].content is None
    assert second.messages[1].tool_calls[0]["function"] == {"name": "f", "arguments": {"on": True}}
    for raw in (path.read_bytes()[:-8], b"PAR1" + b"\0" * 64 + b"PAR1", b"no"):
        (tmp_path / "torn.parquet").write_bytes(raw)
        assert refused(tmp_path / "torn.parquet").what.endswith("torn.parquet: not a whole Parquet file")


def test_parquet_in_gzip_is_refused(tmp_path):
    path = tmp_path / "rows.parquet.gz"
    path.write_bytes(gzip.compress(b"PAR1"))
    for named in (path, tmp_path):
        error = refused(named)
        assert error.what == f"{path}: Parquet in gzip is not read"
        assert error.why == "a Parquet file is read from its end, and its columns are compressed already"
        assert error.fix == f"gunzip {path}, and pass the .parquet file"


def test_parquet_without_pyarrow_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "rows.parquet"
    path.touch()
    error = refused(path)
    assert error.what == f"{path}: Parquet needs the package pyarrow"
    assert error.why == "it is an extra, because few need it"
    assert error.fix == "pip install 'edgelora[parquet]', or convert the file to JSONL"


# -- tables -------------------------------------------------------------------------------------------------------


def test_cells_hold_lists_and_labels(tmp_path):
    messages = json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": 'b\n,"c'}])
    chat = tmp_path / "chat.csv"
    chat.write_text(table([{"messages": messages, "tools": ""}]), encoding="utf-8", newline="")
    ((_, row),) = found(chat)
    assert row.messages[1].content == 'b\n,"c'
    kto = tmp_path / "kto.csv"
    kto.write_text("prompt,completion,label\nHi,Hello,True\nHi,Go,0\n", encoding="utf-8")
    assert [row.desirable for _, row in found(kto)] == [True, False]
    ids = tmp_path / "ids.tsv"
    ids.write_text("input_ids\tlabels\n[1, 2]\t[-100, 2]\n", encoding="utf-8")
    assert found(ids) == [(2, Tokenized((1, 2), (False, True)))]


ASKED, GOOD, BAD = ({"role": r, "content": c} for r, c in [("user", "Hi"), ("assistant", "Hello"), ("assistant", "Go")])
PAIR = Preference(*(Conversation((Message("user", "Hi"), Message("assistant", answer))) for answer in ("Hello", "Go")))
# cells of a row, lists of messages among them → what the row is
MESSAGES_IN_CELLS = {
    "answers": ({"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]}, PAIR),
    "whole conversations": ({"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, PAIR),
    "ShareGPT's": (
        {"prompt": [{"from": "human", "value": "Hi"}], "chosen": [{"from": "gpt", "value": "Hello"}], "rejected": "Go"},
        PAIR,
    ),
    "a completion": ({"prompt": [ASKED], "completion": [GOOD]}, PAIR.chosen),
}


@pytest.mark.parametrize("case", MESSAGES_IN_CELLS)
@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_answers_may_be_lists_of_messages(tmp_path, case, kind):
    row, wanted = MESSAGES_IN_CELLS[case]
    cells = {column: said if isinstance(said, str) else json.dumps(said) for column, said in row.items()}
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pa = pytest.importorskip("pyarrow", reason="pip install pyarrow")
        pq = pytest.importorskip("pyarrow.parquet", reason="pip install pyarrow")
        pq.write_table(pa.Table.from_pylist([cells]), path)
    else:
        path.write_text(table([cells], "\t" if kind == "tsv" else ","), encoding="utf-8", newline="")
    ((_, read),) = found(path)
    assert read == wanted


@pytest.mark.parametrize(
    "said", ['[{"name": "Hi"}]', "[1, 2]", "[]", "[1] says", '[{"role": "user"', '{"role": 1}', DEEP]
)
def test_an_answer_in_json_is_a_text(tmp_path, said):
    path = tmp_path / "rows.csv"
    path.write_text(table([{"prompt": "Hi", "completion": said}]), encoding="utf-8", newline="")
    ((_, row),) = found(path)
    assert row.answer == said


def test_a_cell_may_span_lines_and_the_place_is_where_its_row_begins(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"a\nb",c\nd,\n', encoding="utf-8")
    error = refused(path)
    assert error.what.split("\n  ") == [
        f"{path}: 1 broken row",
        f"{path}:4: no assistant turn to learn: the last message must be a non-empty one by `assistant`",
    ]


@pytest.mark.parametrize(
    ("text", "number", "why"),
    [
        ("prompt,completion\na\n", 2, "more or fewer cells"),
        ("prompt,completion\na,b,c\n", 2, "more or fewer cells"),
        ('prompt,completion\na,b\n"c,d\n', 3, "not a table from here on"),
        ('prompt,completion\na,b\n"c"d,e\n', 3, "not a table from here on"),
        ("messages\n[1\n", 2, "the cell `messages` is not JSON"),
        ('\n\n"prompt\n', 1, "not a table from here on"),
        ("\nprompt,completion,completion\na,b,c\nd,e,f\n", 2, "the header has the column `completion` twice"),
    ],
)
def test_a_broken_table(tmp_path, text, number, why):
    path = tmp_path / "rows.csv"
    path.write_text(text, encoding="utf-8")
    (line,) = refused(path).what.split("\n  ")[1:]
    assert line.startswith(f"{path}:{number}: {why}")


def test_blank_lines_of_a_table_are_left_out(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("\n ,\n\nprompt,completion,,\n\nHi,Hello,,\n\n\nHi,Hello,,\n", encoding="utf-8")
    assert found(path) == [(6, PAIR.chosen), (9, PAIR.chosen)]


# -- text ---------------------------------------------------------------------------------------------------------


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("One.\n\nTwo.\r\n\n\n", encoding="utf-8", newline="")
    assert found(path) == [(1, Document("One.\n\nTwo."))]


def test_a_long_text_is_cut_at_blank_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LARGEST_PART", 20)
    path = tmp_path / "book.txt"
    text = "".join(f"line {i}\n" + "\n" * (i % 4 == 3) for i in range(12))
    path.write_text(text, encoding="utf-8")
    rows = found(path)
    assert "".join(row.text for _, row in rows).rstrip() == text.rstrip()
    assert [number for number, _ in rows] == [1, 5, 10]
    assert all(row.text.startswith("\n") for _, row in rows[1:])
    path.write_text("a" * 100, encoding="utf-8")  # no line ends at all
    assert [len(row.text) for _, row in found(path)] == [40, 40, 20]


# -- the file as a whole ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.txt"])
@pytest.mark.parametrize("raw", [b"", b"\n", b"\xef\xbb\xbf"], ids=repr)
def test_an_empty_file(tmp_path, name, raw):
    path = tmp_path / name
    path.write_bytes(raw)
    error = refused(path)
    assert (error.what, error.why) == (f"{path}: no rows in it", "the file is empty")


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows.txt", "rows.jsonl"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252"])
def test_another_encoding(tmp_path, name, encoding):
    path = tmp_path / name
    path.write_bytes('["größe"]'.encode(encoding))
    assert refused(path).what == f"{path}: not a text file in UTF-8"


def test_torn_gzip(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress(random.Random(0).randbytes(1000).hex().encode() + b"\n")
    flipped = whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:]  # the checksum
    for raw in (whole[:-20], flipped, b"not gzip at all"):
        path.write_bytes(raw)
        error = refused(path)
        assert error.what == f"{path}: not a whole gzip file"
        assert error.fix == "copy or download the file again"


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    for name in ("b/2.csv", "a.jsonl", "b/10.json.gz", ".hidden/x.jsonl", "b/.draft.jsonl", "notes.md", "c.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        text = TEXTS.get(f"rows{path.suffix}", ("a note",))[0]
        path.write_bytes(gzip.compress(json.dumps(ROWS[:2]).encode()) if path.suffix == ".gz" else text.encode())
    assert [f.relative_to(tmp_path).as_posix() for f in files_of(tmp_path)] == [
        "a.jsonl", "b/10.json.gz", "b/2.csv", "c.txt",
    ]  # fmt: skip
    rows = [row for _, row in found(tmp_path)]
    assert rows == [*READ, *READ[:2], *READ, Document("a note")]


def test_a_folder_without_data(tmp_path):
    (tmp_path / "notes.md").write_text("x", encoding="utf-8")
    error = refused(tmp_path)
    assert error.what == f"{tmp_path}: cannot be read (a folder without data)"
    assert all(end in error.why for end in READERS)
    assert error.why.endswith("; all but Parquet also with .gz")


def link(path: Path, target: object) -> None:
    try:
        path.symlink_to(str(target))
    except OSError as e:
        pytest.skip(f"no links here: {e}")


def test_linked_folders_are_read_once_and_loops_end(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for file in (data / "b/2.jsonl", elsewhere / "x.jsonl", elsewhere / "inner/y.jsonl"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(TEXTS["rows.jsonl"][0], encoding="utf-8")
    link(data / "a", elsewhere)
    link(data / "a-real-one", data / "b")
    link(data / "again", elsewhere / "inner")
    link(data / "b/up", data)
    link(data / "c.jsonl", data / "b/2.jsonl")
    link(elsewhere / "back", data)
    assert [f.relative_to(data).as_posix() for f in files_of(data)] == [
        "a/inner/y.jsonl", "a/x.jsonl", "b/2.jsonl", "c.jsonl",
    ]  # fmt: skip
    assert len(found(data)) == 4 * len(ROWS)


@pytest.mark.parametrize("name", ["b.jsonl", "b.csv.gz", "folder"])
def test_a_link_to_nothing_is_no_folder_without_data(tmp_path, name):
    (tmp_path / "a.jsonl").write_text(TEXTS["rows.jsonl"][0], encoding="utf-8")
    link(tmp_path / "notes.md", "nowhere")
    assert len(found(tmp_path)) == len(ROWS)
    link(tmp_path / name, "nowhere")
    error = refused(tmp_path)
    assert error.what == f"{tmp_path / name}: cannot be read (No such file or directory)"
    assert error.why == "it is a link to nowhere, which leads to nothing"
    assert error.fix == "mend the link, or take it out"


def not_for_us(*_, **__):
    raise PermissionError(errno.EACCES, "Permission denied")


def test_a_folder_that_is_closed_to_us_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text(TEXTS["rows.jsonl"][0], encoding="utf-8")
    closed, scandir = tmp_path / "closed", os.scandir
    closed.mkdir()
    monkeypatch.setattr(os, "scandir", lambda at: not_for_us() if at == closed else scandir(at))
    error = refused(tmp_path)
    assert error.what == f"{closed}: cannot be read (Permission denied)"
    assert error.why == "this user may not read it"


def test_a_file_that_is_closed_to_us_is_not_misspelt(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text(TEXTS["rows.jsonl"][0], encoding="utf-8")
    for part in ("open", "stat"):  # the file, or a folder above it
        with monkeypatch.context() as patched:
            patched.setattr(Path, part, not_for_us)
            error = refused(path)
        assert error.what == f"{path}: cannot be read (Permission denied)"
        assert error.why == "this user may not read it"
        assert error.fix.startswith("let this user read it")


def test_a_disk_that_fails_is_no_wrong_path(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text(TEXTS["rows.jsonl"][0], encoding="utf-8")

    def fails(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "open", fails)
    error = refused(path)
    assert (error.what, error.why) == (f"{path}: cannot be read (Input/output error)", "the system failed to read it")


def test_a_name_that_is_too_long(tmp_path):
    path = tmp_path / ("a" * 5000)
    error = refused(path)
    assert error.what == f"{path}: cannot be read (File name too long)"
    assert error.fix == "check the spelling of the path"


def test_a_missing_file(tmp_path):
    for name in ("rows.jsonl", "rows.json", "rows.csv", "rows.txt", "rows.jsonl.gz"):
        path = tmp_path / name
        assert refused(path).what == f"{path}: cannot be read (No such file or directory)"


def test_a_format_named_holds_for_every_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "prompt": "b", "completion": "c"}\n{"text": "d"}\n', encoding="utf-8")
    assert [type(row) for _, row in found(path)] == [Conversation, Document]
    assert [type(row) for _, row in found(path, data_format="text")] == [Document, Document]
    assert refused(path, data_format="completion").what.split("\n  ")[1:] == [
        f"{path}:2: the format completion needs the keys prompt completion; this row has text"
    ]


def test_after_the_first_fault_no_rows_come_and_every_fault_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(['{"text": "a"}', "{", '{"text": "b"}', "[]"]), encoding="utf-8")
    rows = read_rows(path)
    assert next(rows).row == Document("a")
    with pytest.raises(DataError) as caught:
        next(rows)
    assert [line.split(": ")[0] for line in caught.value.what.split("\n  ")] == [f"{path}", f"{path}:2", f"{path}:4"]


def test_rows_of_several_formats_in_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    kinds = [
        {"text": "a"}, {"prompt": "a", "chosen": "b", "rejected": "c"}, {"input_ids": [1, 2]},
        {"prompt": "a", "completion": "b", "label": False},
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, kinds)), encoding="utf-8")
    assert [row.format for row in read_rows(path)] == ["text", "preference", "tokenized", "kto"]
    assert [type(row) for _, row in found(path)] == [Document, Preference, Tokenized, Rated]


# -- JSON, bit by bit ---------------------------------------------------------------------------------------------


class Trickle(io.StringIO):
    """A file that gives one to three characters at a time, whatever is asked for."""

    def read(self, size=-1):
        return super().read(min(size, 1 + self.tell() % 3))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(json_values, max_size=5), st.sampled_from([None, 1]), st.booleans())
def test_any_array_is_read_as_json_reads_it(values, indent, ascii_only):
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    for file in (io.StringIO(text), Trickle(text)):
        assert [value for _, value in json_rows(file, ["text"])] == values


@pytest.mark.parametrize(
    ("text", "rows", "line"),
    [
        ('[{"text": 1},\n{"text": 2},\n{"text" 3}]', 2, 3),
        ('[{"text": 1}\n{"text": 2}]', 1, 2),
        ('[{"text": "a\nb"}]', 0, 1),
        ('[{"text": 1}', 1, 1),
        ('[{"text": "a', 0, 1),
        ("[", 0, 1),
        ("[nul]", 0, 1),
        ("<html>", 0, 1),
        (f"[{DEEP}]", 0, 1),
    ],
)
def test_broken_json_names_the_line(tmp_path, text, rows, line):
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    (fault,) = [f for f in refused(path).what.split("\n  ") if "from here on" in f]
    assert fault.startswith(f"{path}:{line}: not JSON from here on: ")
    read = json_rows(io.StringIO(text), ["text"])
    assert len(list(islice(read, rows))) == rows
    with pytest.raises(json_stream.NotJSONError):
        next(read)


@pytest.mark.parametrize(
    "text",
    [
        '{"text": "a", "data": [{"text": "b"}]}',  # a row itself
        '{"tools": [{"name": "f"}], "id": 1, "text": "a"}',  # its list comes first, and holds no rows
        '{"notes": ["text"], "empty": [], "data": [{"id": 1, "text": "a"}]}',
        '{"data": [{"text": "a"}], "more": [{"id": 1}], "empty": [], "version": 2}',
    ],
)
def test_an_object_is_a_row_or_holds_rows(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    assert found(path) == [(1, Document("a"))]


@pytest.mark.parametrize(
    "text",
    [
        '[{"text": "a"}]\n[{"text": "b"}]\n',
        '[{"text": "a"}]\n[]{"data": [{"text": "b"}]}',
        '{"data": [{"text": "a"}]}\n{"n": 1, "data": [{"text": "b"}], "m": 2}',
        '{"text": "a"}\n{"text": "b"}',
        '{"text": "a"}\n[{"text": "b"}]',
    ],
)
def test_files_that_were_joined_are_read_to_the_end(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    assert found(path) == [(1, Document("a")), (2, Document("b"))]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('[{"text": "a"}]\n}} and more', "not JSON from here on: Expecting value"),
        ('[{"text": "a"}]\n{"text": "b"}', "this object holds no list of rows: put it into a list, as those before it"),
        ('{"data": [{"text": "a"}]}\n{"meta": 1}', "this object holds no list of rows"),
        ('[{"text": "a"}]\n7', "a row must be a JSON object"),
        ('{"text": "a"}\n{"data": [{"text": "b"}]}', "no format has the keys of this row: data"),
        ('{"data": [{"text": "a"}],\n"meta": {"x":', "not JSON from here on: "),
        ('{"data": [{"text": "a"}]\n', "not JSON from here on: expected ,, found the end of the file"),
        ('{"data": [{"text": "a"}],\n7}', "not JSON from here on: expected a key, found 7"),
        (
            '{"train": [{"text": "a"}],\n"test": [{"text": "b"}]}',
            "`train` and `test` both hold rows: split the file, a list in each",
        ),
        ('{"train": [{"text": "a"}],\n"test": [{"id": 1}, {"text": "b"}]}', "`train` and `test` both hold rows"),
        (
            '{"notes": [{"text": "a"}],\n"text": "b"}',
            "`notes` holds rows, and `text` beside it makes the object one: keep one, or put it into a list",
        ),
    ],
)
def test_what_stands_behind_rows_is_never_lost(tmp_path, text, why):
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    (fault,) = refused(path).what.split("\n  ")[1:]
    assert fault.startswith(f"{path}:2: {why}")


# -- streaming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "json", "object.json", "csv", "jsonl.gz", "txt", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind, monkeypatch):
    """30 MB of rows, of which no more than a part of 2 MB is ever held."""
    monkeypatch.setattr(readers, "LARGEST_PART", 1 << 17)
    path = tmp_path / f"rows.{kind}"
    rows = [{"prompt": f"{i} " + "word " * 200, "completion": "x" * 1000} for i in range(15_000)]
    if kind == "parquet":
        pa = pytest.importorskip("pyarrow", reason="pip install pyarrow")
        pq = pytest.importorskip("pyarrow.parquet", reason="pip install pyarrow")
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=500)
    elif kind == "txt":
        path.write_text("\n\n".join(row["prompt"] * 2 for row in rows), encoding="utf-8")
    elif kind.endswith("json"):
        path.write_text(json.dumps({"data": rows} if kind == "object.json" else rows), encoding="utf-8")
    else:
        raw = (table(rows) if kind == "csv" else "\n".join(map(json.dumps, rows))).encode()
        path.write_bytes(gzip.compress(raw, 1) if kind == "jsonl.gz" else raw)
    del rows
    tracemalloc.start()
    try:
        n = sum(1 for _ in read_rows(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert n == 15_000 or kind == "txt"
    assert peak < 2 << 20


def test_the_first_rows_come_before_the_file_is_read(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "a" * 100}] * 10_000), encoding="utf-8")
    read = 0
    original = json_stream._Values._read

    def counted(self, size):
        nonlocal read
        read += size
        original(self, size)

    monkeypatch.setattr(json_stream._Values, "_read", counted)
    assert len(list(islice(read_rows(path), 10))) == 10
    assert read == json_stream.CHUNK


@pytest.mark.parametrize("name", ["sql.train", "tools.train", "general.train"])
def test_real_files_read_alike_in_every_kind(shared_data, tmp_path, name):
    lines = (shared_data / "datasets" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    wanted = [row for _, row in found(shared_data / "datasets" / f"{name}.jsonl")]
    rows = [json.loads(line) for line in lines]
    cells = [{key: json.dumps(row[key]) if key in row else "" for key in ("messages", "tools")} for row in rows]
    (tmp_path / "a.json").write_text(json.dumps({"rows": rows}, indent=2), encoding="utf-8")
    (tmp_path / "a.csv").write_text(table(cells), encoding="utf-8", newline="")
    for kind in ("a.json", "a.csv"):
        assert [row for _, row in found(tmp_path / kind)] == wanted
