"""One reader for each kind of file: rows as the file has them, each with its line, or what is wrong there.

Reads no row as a format. Whatever the size of a file, one row of it is in memory.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, NamedTuple

from edgelora.data.formats import DATA_FORMATS
from edgelora.data.json_stream import NoMoreRowsError, json_rows
from edgelora.errors import DataError

LARGEST_PART = 1 << 20  # characters of a plain text that are one document
LONGEST_CELL = 1 << 30  # characters; csv's own limit of 131,072 is less than a long conversation
# what a cell of a table may hold as JSON, because no cell can hold it otherwise
JSON_COLUMNS = (
    "messages", "conversations", "tools", "history", "input_ids", "labels", "loss_mask", "attention_mask",
)  # fmt: skip
# and what it may hold as a text, or as a list of messages
SAID_COLUMNS = ("prompt", "completion", "chosen", "rejected")
TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
ROW_KEYS = frozenset(key for known in DATA_FORMATS.values() for key in known.keys.split())


class Raw(NamedTuple):
    """A row as the file has it, not yet read as any format; a ValueError where it cannot be had."""

    number: int
    value: Any


def suffix_of(path: Path) -> str:
    """`.jsonl` of rows.jsonl and of rows.jsonl.gz."""
    suffixes = [s.lower() for s in path.suffixes if s.lower() != ".gz"]
    return suffixes[-1] if suffixes else ""


def _open(path: Path, newline: str = "\n") -> IO[str]:
    """A text file, compressed or not; Windows editors put a mark in front, which is no part of it."""
    if path.suffix.lower() == ".gz":
        return TextIOWrapper(gzip.open(path), encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


def _jsonl(path: Path) -> Iterator[Raw]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    value = json.loads(line)
                except RecursionError:
                    value = ValueError("nested too deeply")
                except ValueError as e:
                    value = e
                yield Raw(number, value)


def _json(path: Path) -> Iterator[Raw]:
    with _open(path) as file:
        try:
            for number, value in json_rows(file, ROW_KEYS):
                yield Raw(number, value)
        except NoMoreRowsError as e:
            yield Raw(e.line, e)


def _table(path: Path, delimiter: str) -> Iterator[Raw]:
    """A table with a header, which is the first line that is not blank."""
    csv.field_size_limit(LONGEST_CELL)
    with _open(path, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        number = 0
        try:
            header = next((cells for cells in reader if any(map(str.strip, cells))), [])
            if twice := [column for column, times in Counter(header).items() if times > 1 and column.strip()]:
                yield Raw(reader.line_num, ValueError(f"the header has the column `{twice[0]}` twice"))
                return
            number = reader.line_num
            for cells in reader:
                before, number = number + 1, reader.line_num
                if cells:
                    yield Raw(before, _row(header, cells))
        except csv.Error as e:
            yield Raw(number + 1, ValueError(f"not a table from here on: {e}"))


def _row(header: list[str], cells: list[str]) -> dict[str, Any] | ValueError:
    if len(cells) != len(header):
        return ValueError("more or fewer cells than the header has")
    row: dict[str, Any] = {}
    for column, cell in zip(header, cells, strict=True):
        if column in JSON_COLUMNS:
            if not cell.strip():
                continue
            try:
                row[column] = json.loads(cell)
            except (ValueError, RecursionError):
                return ValueError(f"the cell `{column}` is not JSON")
        else:
            row[column] = TRUTH.get(cell.strip().lower(), cell) if column == "label" else _said(column, cell)
    return row


def _said(column: str, cell: Any) -> Any:
    """The cell, or the messages that it holds as JSON."""
    if column not in SAID_COLUMNS or not isinstance(cell, str) or not cell.lstrip().startswith("["):
        return cell
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(cell)
        if value and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in value):
            return value
    return cell


def _csv(path: Path) -> Iterator[Raw]:
    return _table(path, ",")


def _tsv(path: Path) -> Iterator[Raw]:
    return _table(path, "\t")


def _text(path: Path) -> Iterator[Raw]:
    """A text is one document: a blank line in it ends a paragraph, not what somebody wrote.

    Parts of about LARGEST_PART characters, which end at a blank line where there is one, are documents of their own:
    a text is tokenized whole, and memory is bounded.
    """
    lines: list[str] = []
    size, first = 0, 1
    with _open(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LARGEST_PART), ""), 1):
            if size >= LARGEST_PART and (not line.strip() or size >= 2 * LARGEST_PART):
                yield Raw(first, {"text": "".join(lines)})
                lines, size, first = [], 0, number
            lines.append(line)
            size += len(line)
    if text := "".join(lines).rstrip("\r\n"):
        yield Raw(first, {"text": text})


def _parquet(path: Path) -> Iterator[Raw]:
    if path.suffix.lower() == ".gz":
        raise DataError(
            what=f"{path}: Parquet in gzip is not read",
            why="a Parquet file is read from its end, and its columns are compressed already",
            fix=f"gunzip {path}, and pass the .parquet file",
        )
    try:
        pa, pq = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as e:
        raise DataError(
            what=f"{path}: Parquet needs the package pyarrow",
            why="it is an extra, because few need it",
            fix="pip install 'edgelora[parquet]', or convert the file to JSONL",
        ) from e
    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=16):
                for row in batch.to_pylist():
                    number += 1
                    yield Raw(number, {column: _said(column, cell) for column, cell in _without_nulls(row).items()})
    except (pa.ArrowException, OSError) as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise
        raise DataError(
            what=f"{path}: not a whole Parquet file", why=str(e).split("\n")[0], fix="copy or download the file again"
        ) from e


def _without_nulls(value: Any) -> Any:
    """Columns hold every key that any row has: those that a row did not have are null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


# by the end of a file's name; any other end is read as JSONL. What a row is called where it is broken stands beside it.
READERS: dict[str, tuple[Callable[[Path], Iterator[Raw]], str]] = {
    ".jsonl": (_jsonl, "line"),
    ".ndjson": (_jsonl, "line"),
    ".json": (_json, "row"),
    ".csv": (_csv, "row"),
    ".tsv": (_tsv, "row"),
    ".parquet": (_parquet, "row"),
    ".txt": (_text, "line"),
}


def reader_of(path: Path) -> tuple[Callable[[Path], Iterator[Raw]], str]:
    """The row of `READERS` for a file."""
    return READERS.get(suffix_of(path), READERS[".jsonl"])


def unparsed(path: Path) -> Iterator[object]:
    """Something for each row, at the least cost."""
    read, _ = reader_of(path)
    if read is not _jsonl:
        yield from read(path)
        return
    with _open(path) as file:
        yield from file
