"""Small sqlite databases that several processes write to: durable, patient with each other, of one known schema."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from edgelora.errors import OutputError

WAIT_SECONDS = 10.0


@contextmanager
def database(path: Path, schema: str, version: int) -> Iterator[sqlite3.Connection]:
    """An open database at `path`, made by `schema` (CREATE statements) if it is new; closed behind the block.

    Nothing is in a transaction until the block begins one: `with immediate(db):`.
    Raises OutputError if the database cannot be made, or was made by another version; sqlite3.Error for the rest.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=WAIT_SECONDS, isolation_level=None)
    except (OSError, sqlite3.Error) as e:
        raise OutputError(
            what=f"{path}: cannot be opened ({e})",
            why="the folder is missing, read-only or full",
            fix="set EDGELORA_HOME to a folder you may write to",
        ) from e
    with closing(connection):
        if (found := _version(connection)) == 0:
            _create(connection, schema, version)
        elif found != version:
            raise OutputError(
                what=f"{path}: written as version {found}, {version} is known here",
                why="another edgelora made it",
                fix="use that edgelora, or move the file away to begin anew",
            )
        connection.execute("PRAGMA foreign_keys = ON")
        yield connection


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


def _create(connection: sqlite3.Connection, schema: str, version: int) -> None:
    connection.execute("PRAGMA journal_mode = WAL")  # readers do not wait for a writer; kept in the file
    with immediate(connection):
        if _version(connection) == 0:  # else another process was faster
            for statement in schema.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {version}")
