"""Which adapters have passed their checks over which base: kept between runs, so that each is checked once.

A cache: losing it costs time only, and one that cannot be read or written is as good as an empty one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

from edgelora.errors import BaseModelError, OutputError
from edgelora.files.database import database, immediate

CHECKS = 1  # to be raised with every change of what is checked: older verdicts are then not asked
SETTLED_NS = 2 * 10**9  # a file younger than this may change again without a change of its time
MAX_ROWS = 10_000
SCHEMA = """
CREATE TABLE files (path TEXT PRIMARY KEY, mark TEXT NOT NULL, digest TEXT NOT NULL);
CREATE TABLE passed (digest TEXT, place TEXT, contract TEXT, invocation TEXT NOT NULL, PRIMARY KEY (digest, place))
"""


@dataclass(frozen=True)
class Verdict:
    """What the checks have found in a file that passed them all."""

    contract: str | None
    """Its text as it stands in the file; None in a file made elsewhere."""
    invocation: tuple[int, ...]


@dataclass(frozen=True)
class Verdicts:
    """The cache in `folder`."""

    folder: Path

    def digest(self, path: Path, state: os.stat_result) -> str | None:
        """The sha256 of the file that was at `path` in this very state; None if it is not known."""
        row = self._ask("SELECT digest FROM files WHERE path = ? AND mark = ?", str(path.absolute()), _mark(state))
        return None if row is None else row[0]

    def keep_digest(self, path: Path, state: os.stat_result, digest: str) -> None:
        """Remember it, unless the file is so young that its next change could leave no trace in its state."""
        if time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) > SETTLED_NS:
            self._tell("files", str(path.absolute()), _mark(state), digest)

    def find(self, digest: str, place: str) -> Verdict | None:
        """What was found in the adapter with this digest, if it has passed over the base of `place`."""
        row = self._ask("SELECT contract, invocation FROM passed WHERE digest = ? AND place = ?", digest, place)
        return None if row is None else Verdict(row[0], tuple(map(int, row[1].split())))

    def keep(self, digest: str, place: str, verdict: Verdict) -> None:
        """Remember what passed over the base of `place`."""
        self._tell("passed", digest, place, verdict.contract, " ".join(map(str, verdict.invocation)))

    def _ask(self, question: str, *values: str) -> tuple[str, ...] | None:
        with contextlib.suppress(OutputError), database(self._path, SCHEMA, CHECKS) as db:
            row: tuple[str, ...] | None = db.execute(question, values).fetchone()
            return row
        return None

    def _tell(self, table: str, *values: str | None) -> None:
        with contextlib.suppress(OutputError), database(self._path, SCHEMA, CHECKS) as db, immediate(db):
            db.execute(f"INSERT OR REPLACE INTO {table} VALUES ({', '.join('?' * len(values))})", values)
            # the oldest go: rows are numbered in the order in which they were written
            db.execute(f"DELETE FROM {table} WHERE rowid <= (SELECT max(rowid) FROM {table}) - {MAX_ROWS}")

    @property
    def _path(self) -> Path:
        return self.folder / f"adapters-{CHECKS}.sqlite"


def place_of(files: Sequence[Path]) -> str:
    """What a verdict holds for: these files of a base as they stand, and this llama.cpp.

    Raises BaseModelError if they are not there any more.
    """
    try:
        states = [_mark(path.stat()) for path in files]
    except OSError as e:
        raise BaseModelError(
            what=f"{e.filename}: cannot be read any more ({e.strerror})",
            why="the base was moved or deleted since it was opened, and adapters are tried over its file",
            fix="put it back, or open the base anew",
        ) from e
    return hashlib.sha256(" ".join([*states, _llama_cpp()]).encode()).hexdigest()


@cache
def _llama_cpp() -> str:
    return version("llama-cpp-python")


def _mark(state: os.stat_result) -> str:
    """By which a file is known to be unchanged; its owner can set the time of its content, not that of its state."""
    fields = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    return "-".join(map(str, fields))
