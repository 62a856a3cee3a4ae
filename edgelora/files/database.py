"""Small sqlite databases that several processes write to: durable, patient with each other, of one known schema."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from edgelora.errors import OutputError

WAIT_SECONDS = 10.0


@contextmanager
def database(path: Path, schema: str, version: int) -> Iterator[sqlite3.Connection]:
    """An open database at `path`, made by `schema` (CREATE statements) if it is new; closed behind the block.

    Nothing is in a transaction until the block begins one: `with immediate(db):`.
    Raises OutputError for all that sqlite refuses, and if another version made the database.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=WAIT_SECONDS, isolation_level=None)) as connection:
            if (found := _version(connection)) == 0:
                found = _create(connection, schema, version)
            if found != version:
                raise OutputError(
                    what=f"{path}: written as version {found}, {version} is known here",
                    why="another edgelora made it",
                    fix="use that edgelora, or move the file away to begin anew",
                )
            yield connection
    except (OSError, sqlite3.Error) as e:
        raise OutputError(
            what=f"{path}: sqlite cannot work with it ({e})",
            why="the folder is missing, read-only or full, or the file is damaged",
            fix="set EDGELORA_HOME to a folder you may write to; a damaged file may be moved away",
        ) from e


@contextmanager
def immediate(connection: sqlite3.Connection) -> Iterator[None]:
    """The only writer for the block: all of it stands afterwards, or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _create(connection: sqlite3.Connection, schema: str, version: int) -> int:
    """Make what is in it, unless another process was faster; returns the version that it has then."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")  # readers do not wait for a writer; kept in the file
            break
        except sqlite3.OperationalError:  # another process is at this very point: sqlite does not wait here by itself
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    with immediate(connection):
        if _version(connection) == 0:
            for statement in schema.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {version}")
    return _version(connection)
