"""Rows out of files, one at a time: JSONL, JSON, CSV, TSV, plain text, gzip of them, Parquet, and folders of all these.

Every fault of a file is reported at once, with its line. Whatever the size of a file, one row of it is in memory.
"""

from __future__ import annotations

import errno
import gzip
import os
import stat
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from edgelora.data.formats import AUTO, known_formats, parse_row
from edgelora.data.readers import READERS, reader_of, suffix_of, unparsed
from edgelora.data.rows import Row
from edgelora.errors import DataError

MAX_FAULTS_SHOWN = 20
NO_SUCH_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO)

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
        read, unit = reader_of(file)
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
    return sum(1 for file in files for _ in _guarded(file, unparsed(file)))


def files_of(path: Path) -> list[Path]:
    """The file, or those files of a folder (and the folders in it) that may hold rows; hidden ones are left out.

    Links are followed, and each folder is read once. Raises DataError for what cannot be looked into.
    """
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            return [path]
    except OSError as e:
        raise cannot_read(path, e) from e
    found = sorted(_inside(path), key=lambda file: file.relative_to(path).parts)
    if not found:
        raise DataError(
            what=f"{path}: cannot be read (a folder without data)",
            why=f"files of a folder are read if their names end in {', '.join(READERS)}; all but Parquet also with .gz",
            fix="name a file of rows, or a folder with such files in it",
        )
    return found


def _inside(top: Path) -> Iterator[Path]:
    """The files of rows in a folder, in no order."""
    folders, linked, seen = [top], deque[Path](), set[tuple[int, int]]()
    while folders or linked:
        folder = folders.pop() if folders else linked.popleft()  # a file has the name without a link where it has one
        try:
            state = folder.stat()
            if (state.st_dev, state.st_ino) in seen:
                continue
            seen.add((state.st_dev, state.st_ino))
            with os.scandir(folder) as entries:
                visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
        except OSError as e:
            raise cannot_read(folder, e) from e
        for entry in visible:
            file = folder / entry.name
            if _is_folder(entry, file):
                (linked if entry.is_symlink() else folders).append(file)
            elif suffix_of(file) in READERS and entry.is_file():
                yield file


def _is_folder(entry: os.DirEntry[str], file: Path) -> bool:
    """Raises DataError for a link to nothing that was rows, or a folder of them."""
    try:
        if entry.is_symlink() and suffix_of(file) in (*READERS, ""):
            file.stat()
        return entry.is_dir()
    except OSError as e:
        raise cannot_read(file, e) from e


def _read_file(path: Path, data_format: str) -> Iterator[Found]:
    read, unit = reader_of(path)
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


def cannot_read(path: Path, e: OSError) -> DataError:
    """What is raised where a file that somebody named cannot be opened or read."""
    if isinstance(e, PermissionError):
        why, fix = "this user may not read it", "let this user read it (chmod, or ask its owner), or name another file"
    elif e.errno in (errno.ENOENT, errno.ELOOP) and path.is_symlink():
        why, fix = f"it is a link to {path.readlink()}, which leads to nothing", "mend the link, or take it out"
    elif e.errno in NO_SUCH_PATH:
        why, fix = "the path is wrong, or is not a file", "check the spelling of the path"
    else:
        why, fix = "the system failed to read it", "see whether its disk or network is in order, or copy it elsewhere"
    return DataError(what=f"{path}: cannot be read ({e.strerror or e})", why=why, fix=fix)
