"""Adapters under names: a registry of what each is, and every content once, as a file named by its sha256.

    <home>/adapters/registry.sqlite      name → content, and what is known of the content
    <home>/adapters/blobs/<sha256>.gguf  read-only, whole or not there

A name appears after its content and goes before it, so a crash in between leaves a content without a name, which the
next change removes, and never a name without a content. Two processes may do anything at the same time.
"""

from __future__ import annotations

import datetime
import json
import sqlite3
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from edgelora.errors import AdapterError, OutputError
from edgelora.files.adapter_check import contract_of, own_shapes, require_fit
from edgelora.files.atomic import require_space, staged, sweep
from edgelora.files.contract import CERTIFICATE_BYTES, CERTIFICATE_KEY, Contract, sha256_bytes, sha256_file
from edgelora.files.database import database, immediate
from edgelora.files.gguf import GGUFFile
from edgelora.files.soft_prompt import is_soft, require_sound
from edgelora.files.whole import read_whole
from edgelora.home import models_folder
from runtime.names import STORED, require_stored_name

MOST_BYTES = 8 << 30
ANY_TOKEN = 1 << 31  # the base, which knows how many it has, is asked when the adapter is loaded
VERSION = 1
SCHEMA = """
CREATE TABLE blobs (
    digest TEXT PRIMARY KEY, size_bytes INTEGER NOT NULL, method TEXT NOT NULL, ranks TEXT NOT NULL,
    base TEXT, base_name TEXT, base_quant TEXT, system TEXT, single_turn INTEGER NOT NULL, scores TEXT NOT NULL
);
CREATE TABLE names (name TEXT PRIMARY KEY, digest TEXT NOT NULL REFERENCES blobs, added TEXT NOT NULL)
"""


@dataclass(frozen=True)
class About:
    """What an adapter's file says of itself. What only a contract tells is None in one that was made elsewhere."""

    digest: str
    size_bytes: int
    method: str
    ranks: tuple[int, ...]
    """Those that occur, ascending."""
    base: str | None
    """The short fingerprint of its base: the same at every quantization."""
    base_name: str | None
    base_quant: str | None
    """The quantization it was trained over, to which its gain belongs."""
    system: str | None
    """The system message it was trained with."""
    single_turn: bool
    scores: Mapping[str, Any]
    """`evaluation`: of its training; `certificate`: of its export, against torch. Each may be missing."""


@dataclass(frozen=True)
class Stored:
    """An adapter of the store."""

    name: str
    added: str
    """UTC, ISO 8601, seconds."""
    path: Path
    about: About

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "added": self.added, "path": str(self.path), **asdict(self.about)}


class Store:
    """The adapters in `folder`, by default those of the user's home. It is made when the first one is added."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or models_folder() / "adapters"
        self._blobs = self.folder / "blobs"

    def all(self) -> list[Stored]:
        """All of them, by name. Raises OutputError if the registry cannot be read."""
        return self._find("")

    def get(self, name: str) -> Stored:
        """Raises AdapterError if there is none of this name."""
        if found := self._find("WHERE name = ?", name):
            return found[0]
        raise self._unknown(f"no adapter is stored as {name!r}")

    def add(self, name: str, path: Path, *, overwrite: bool = False) -> Stored:
        """Keep the GGUF adapter at `path` as `name`; the same content under the same name again changes nothing.

        It is checked as far as that needs no base. Raises ConfigError for an impossible name, FileFormatError or
        AdapterError for a file that is no adapter, OutputError if the name is taken or nothing can be written.
        """
        require_stored_name(name)
        if path.is_dir():
            raise AdapterError(
                what=f"{path}: a folder, and what is stored is what llama.cpp loads",
                why="a folder in PEFT's format is what training writes",
                fix=f"export it first: edgelora export BASE {path} --out {path.name}.gguf",
            )
        content = read_whole(path, MOST_BYTES).content
        about = _about(path, content)
        with database(self._registry, SCHEMA, VERSION) as db:
            try:
                while not self._entered(db, name, about, overwrite):
                    self._publish(about.digest, content)
            finally:
                self._collect(db)
        return self.get(name)

    def remove(self, name: str) -> None:
        """Take the name away, and the content with the last name it had. Raises AdapterError for an unknown name.

        Who has loaded it goes on: the engine keeps no file open.
        """
        self.get(name)
        with database(self._registry, SCHEMA, VERSION) as db:
            db.execute("DELETE FROM names WHERE name = ?", (name,))
            self._collect(db)

    def resolve(self, name_or_path: str) -> Path:
        """The file that is meant where a file or a stored name may stand: a file of this very path comes first.

        Raises AdapterError if it is neither; what cannot be a name is taken for a path, whether or not it exists.
        """
        path = Path(name_or_path)
        if path.is_file() or not STORED.fullmatch(name_or_path):
            return path
        if found := self._find("WHERE name = ?", name_or_path):
            return found[0].path
        if path.exists():
            return path
        raise self._unknown(f"{name_or_path}: neither a file nor the name of a stored adapter")

    def _unknown(self, what: str) -> AdapterError:
        known = ", ".join(stored.name for stored in self.all())
        return AdapterError(
            what=what,
            why=f"stored are: {known or 'none yet'}",
            fix="add it first: edgelora adapters add FILE --name NAME",
        )

    def _find(self, condition: str, *values: str) -> list[Stored]:
        if not self._registry.exists():
            return []
        columns = ", ".join(field.name for field in fields(About))
        question = f"SELECT name, added, {columns} FROM names JOIN blobs USING (digest) {condition} ORDER BY name"
        with database(self._registry, SCHEMA, VERSION) as db:
            rows = db.execute(question, values).fetchall()
        return [Stored(name, added, self._blob(row[0]), _from_row(row)) for name, added, *row in rows]

    def _publish(self, digest: str, content: bytes) -> None:
        """Let the content stand under its digest, in place of one that was damaged there."""
        blob = self._blob(digest)
        require_space(blob.parent, len(content), "the adapter's weights")
        with staged(blob, overwrite=True) as draft:
            draft.write_bytes(content)
            draft.chmod(0o444)

    def _entered(self, db: sqlite3.Connection, name: str, about: About, overwrite: bool) -> bool:
        """Let the name stand for the content; False if that is not there, or was removed since it was published."""
        with immediate(db):  # nobody removes a content meanwhile
            row = db.execute("SELECT digest FROM names WHERE name = ?", (name,)).fetchone()
            if row is not None and row[0] != about.digest and not overwrite:
                raise OutputError(
                    what=f"the name {name} is taken",
                    why=f"it stands for another adapter (sha256 {row[0][:12]}…)",
                    fix="choose another name, remove that one, or pass --overwrite",
                )
            if not self._is_whole(about):
                return False
            if row is None or row[0] != about.digest:
                values = _to_row(about)
                db.execute(f"INSERT OR IGNORE INTO blobs VALUES ({', '.join('?' * len(values))})", values)
                now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                db.execute("INSERT OR REPLACE INTO names VALUES (?, ?, ?)", (name, about.digest, now))
            return True

    def _is_whole(self, about: About) -> bool:
        blob = self._blob(about.digest)
        return blob.is_file() and blob.stat().st_size == about.size_bytes and sha256_file(blob) == about.digest

    def _collect(self, db: sqlite3.Connection) -> None:
        """Remove what no name refers to, and what killed processes left.

        Behind the change of the names, never together with it: a crash must leave no name without a content.
        """
        with immediate(db):
            db.execute("DELETE FROM blobs WHERE digest NOT IN (SELECT digest FROM names)")
            kept = {self._blob(row[0]) for row in db.execute("SELECT digest FROM blobs")}
            for blob in self._blobs.glob("*.gguf"):
                if blob not in kept:
                    blob.unlink()
        sweep(self._blobs)

    @property
    def _registry(self) -> Path:
        return self.folder / "registry.sqlite"

    def _blob(self, digest: str) -> Path:
        return self._blobs / f"{digest}.gguf"


def _about(path: Path, content: bytes) -> About:
    """Read and check a file as far as that needs no base."""
    file = GGUFFile(path, content)
    if soft := is_soft(file):
        require_sound(file)
    else:
        require_fit(file, file.architecture, own_shapes(file), n_vocab=ANY_TOKEN)
    contract = contract_of(file)
    made_as = file.get("adapter.type", str, "lora") if soft else "lora"
    ranks = {info.shape[-2] for name, info in file.tensors.items() if name.endswith(".lora_a")}
    return About(
        digest=sha256_bytes(content), size_bytes=len(content), method=contract.method if contract else made_as,
        ranks=tuple(sorted(ranks)), base=contract.base.short if contract else None,
        base_name=contract.base_file.name if contract else None,
        base_quant=contract.base_file.quant if contract else None, system=contract.system if contract else None,
        single_turn=contract is not None and contract.single_turn, scores=_scores(file, contract),
    )  # fmt: skip


def _scores(file: GGUFFile, contract: Contract | None) -> dict[str, Any]:
    text = file.get(CERTIFICATE_KEY, str, "")
    try:
        certificate = json.loads(text[:CERTIFICATE_BYTES])
    except (ValueError, RecursionError):  # none, or only room that was kept for one
        certificate = None
    scores = {"evaluation": contract.evaluation if contract else None, "certificate": certificate}
    return {name: found for name, found in scores.items() if isinstance(found, dict) and found}


def _to_row(about: About) -> tuple[Any, ...]:
    packed = {"ranks": json.dumps(about.ranks), "scores": json.dumps(about.scores)}
    return tuple(packed.get(field.name, getattr(about, field.name)) for field in fields(About))


def _from_row(row: list[Any]) -> About:
    found = dict(zip((field.name for field in fields(About)), row, strict=True))
    ranks, scores = tuple(json.loads(found.pop("ranks"))), json.loads(found.pop("scores"))
    return About(**{**found, "single_turn": bool(found["single_turn"])}, ranks=ranks, scores=scores)
