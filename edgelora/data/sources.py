"""Rows out of files, one at a time: JSONL, JSON, CSV, TSV, Parquet, plain text, gzip of them, and folders of all these.

Every fault of a file is reported at once, with its line. Whatever the size of a file, one row of it is in memory.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from edgelora.data.formats import AUTO, DATA_FORMATS, known_formats, parse_row
from edgelora.data.json_stream import NotJSONError, json_rows
from edgelora.data.rows import Row
from edgelora.errors import DataError

MAX_FAULTS_SHOWN = 20
LARGEST_PART = 1 << 20  # characters of a plain text that are one document
LONGEST_CELL = 1 << 30  # characters; csv's own limit of 131,072 is less than a long conversation
# what a cell of a table may hold as JSON, because no cell can hold it otherwise
JSON_COLUMNS = (
    "messages", "conversations", "tools", "history", "input_ids", "labels", "loss_mask", "attention_mask",
)  # fmt: skip
TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
ROW_KEYS = frozenset(key for known in DATA_FORMATS.values() for key in known.keys.split())

Item = TypeVar("Item")


class Place(NamedTuple):
    """Where a row stands: a line of its file, or its number in a Parquet file, from 1."""

    path: Path
    number: int

    def __str__(self) -> str:
        return f"{self.path}:{self.number}"


class Found(NamedTuple):
    """A row of a file."""

    place: Place
    format: str
    row: Row


@dataclass
class Faults:
    """What is broken in a file, collected and reported at once."""

    path: Path
    unit: str = "line"
    why: str = field(default_factory=lambda: f"each row must be an object of one of the formats {known_formats()}")
    _shown: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, place: Place, reason: object) -> None:
        """Count a fault; the first MAX_FAULTS_SHOWN are shown."""
        self.count += 1
        if self.count <= MAX_FAULTS_SHOWN:
            self._shown.append(f"{place}: {reason}")

    def report(self) -> None:
        """Raise DataError if there are any."""
        if self.count:
            more = f"\n  … and {self.count - MAX_FAULTS_SHOWN} more" if self.count > MAX_FAULTS_SHOWN else ""
            raise DataError(
                what=f"{self.path}: {self.count} broken {self.unit}{'s' * (self.count > 1)}\n  "
                + "\n  ".join(self._shown) + more,
                why=self.why,
                fix=f"mend these {self.unit}s or take them out",
            )  # fmt: skip


def read_rows(path: Path, data_format: str = AUTO) -> Iterator[Found]:
    """Each row of a file, or of all files of a folder in the order of their names.

    Raises DataError with up to 20 broken lines of a file at once: when the first is found no more rows come, and the
    rest of the file is only looked through. Raises DataError also for a file without rows, or one that is unreadable.
    """
    for file in files_of(path):
        yield from _read_file(file, data_format)


def read_objects(path: Path) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Each row of a file or folder as it stands, whatever its columns; for rows that are no training data.

    Raises DataError as `read_rows` does.
    """
    for file in files_of(path):
        read, unit = READERS.get(_suffix(file), READERS[".jsonl"])
        faults, empty = Faults(file, unit, "each row must be an object of named columns"), True
        for number, raw in _guarded(file, read(file)):
            empty, place = False, Place(file, number)
            if not isinstance(raw, dict):
                faults.add(place, raw if isinstance(raw, ValueError) else "a row must be an object")
            elif not faults.count:
                yield place, raw
        faults.report()
        if empty:
            raise _empty(file)


def count_rows(path: Path) -> int | None:
    """How many rows a file or folder has, or a few more, for blank lines are counted too. None for a pipe: it can be
    read only once. Raises DataError for a file that is unreadable."""
    files = files_of(path)
    if not all(file.is_file() for file in files):
        return None
    return sum(1 for file in files for _ in _guarded(file, _unparsed(file)))


def files_of(path: Path) -> list[Path]:
    """The file, or those files of a folder (and the folders in it) that may hold rows; hidden ones are left out."""
    if not path.is_dir():
        return [path]
    inside = sorted(path.rglob("*"), key=lambda file: file.relative_to(path).parts)
    visible = (f for f in inside if not any(part.startswith(".") for part in f.relative_to(path).parts))
    found = [file for file in visible if file.is_file() and _suffix(file) in READERS]
    if not found:
        raise DataError(
            what=f"{path}: cannot be read (a folder without data)",
            why=f"files of a folder are read if their names end in {', '.join(READERS)}, or in one of these and .gz",
            fix="name a file of rows, or a folder with such files in it",
        )
    return found


def _read_file(path: Path, data_format: str) -> Iterator[Found]:
    read, unit = READERS.get(_suffix(path), READERS[".jsonl"])
    faults, empty = Faults(path, unit), True
    for number, raw in _guarded(path, read(path)):
        empty, place = False, Place(path, number)
        try:
            if isinstance(raw, ValueError):
                raise raw
            name, row = parse_row(raw, data_format)
        except ValueError as e:
            faults.add(place, e)
        else:
            if not faults.count:
                yield Found(place, name, row)
    faults.report()
    if empty:
        raise _empty(path)


def _empty(path: Path) -> DataError:
    return DataError(
        what=f"{path}: no rows in it", why="the file is empty", fix="pass a file with rows: JSONL has one a line"
    )


def _suffix(path: Path) -> str:
    """`.jsonl` of rows.jsonl and of rows.jsonl.gz."""
    suffixes = [s.lower() for s in path.suffixes if s.lower() != ".gz"]
    return suffixes[-1] if suffixes else ""


def _unparsed(path: Path) -> Iterator[object]:
    """Something for each row, at the least cost."""
    read, _ = READERS.get(_suffix(path), READERS[".jsonl"])
    if read is not _jsonl:
        yield from read(path)
        return
    with _open(path) as file:
        yield from file


def _guarded(path: Path, raw_rows: Iterator[Item]) -> Iterator[Item]:
    """The rows, with what can be wrong with the file itself as a DataError."""
    try:
        yield from raw_rows
    except UnicodeDecodeError as e:
        raise DataError(
            what=f"{path}: not a text file in UTF-8", why=str(e.reason), fix="convert the file to UTF-8"
        ) from e
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise DataError(what=f"{path}: not a whole gzip file", why=str(e), fix="copy or download the file again") from e
    except OSError as e:
        raise cannot_read(path, e) from e


def _open(path: Path, newline: str = "\n") -> IO[str]:
    """A text file, compressed or not; Windows editors put a mark in front, which is no part of it."""
    if path.suffix.lower() == ".gz":
        return TextIOWrapper(gzip.open(path), encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


# -- one reader for each kind of file: (line, row, or what is wrong with it) ---------------------------------------


class Raw(NamedTuple):
    """A row as the file has it, not yet read as any format; a ValueError where it cannot be had."""

    number: int
    value: Any


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
        except NotJSONError as e:
            yield Raw(e.line, e)


def _table(path: Path, delimiter: str) -> Iterator[Raw]:
    """A table with a header; `None` stands for a missing cell, and for one too many."""
    csv.field_size_limit(LONGEST_CELL)
    with _open(path, newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        number = 1
        try:
            for cells in reader:
                before, number = number + 1, reader.line_num
                whole = None not in cells and None not in cells.values()
                yield Raw(before, _cells(cells) if whole else ValueError("more or fewer cells than the header has"))
        except csv.Error as e:
            yield Raw(number + 1, ValueError(f"not a table from here on: {e}"))


def _cells(cells: dict[str, str]) -> dict[str, Any] | ValueError:
    row: dict[str, Any] = {}
    for column, cell in cells.items():
        if column in JSON_COLUMNS:
            if not cell.strip():
                continue
            try:
                row[column] = json.loads(cell)
            except (ValueError, RecursionError):
                return ValueError(f"the cell `{column}` is not JSON")
        else:
            row[column] = TRUTH.get(cell.strip().lower(), cell) if column == "label" else cell
    return row


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
                    yield Raw(number, _without_nulls(row))
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


def cannot_read(path: Path, e: OSError) -> DataError:
    """What is raised where a file that somebody named cannot be opened or read."""
    return DataError(
        what=f"{path}: cannot be read ({e.strerror or e})",
        why="the path is wrong, or is not a file",
        fix="check the spelling of the path",
    )
