"""Known bases, named by what is in them: `models/catalog.toml`, and one of the user's own in their models folder."""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import dataclass
from pathlib import Path

from edgelora.errors import ConfigError
from edgelora.home import CHECKOUT, models_folder

FILE_NAME = "catalog.toml"
DIGEST_LETTERS = 64


@dataclass(frozen=True)
class Known:
    """A base of the catalog."""

    name: str
    source: str
    """Where this very file comes from."""
    original: str
    """The model that it was made of."""
    licence: str
    architecture: str
    """llama.cpp's name of it."""
    size_bytes: int
    sha256: str


def catalog() -> dict[str, Known]:
    """Known bases by their sha256; the user's catalog adds to that of the checkout.

    Raises ConfigError that names the entry which is wrong.
    """
    files = dict.fromkeys([CHECKOUT / "models" / FILE_NAME, models_folder() / FILE_NAME])
    return {known.sha256: known for file in files if file.is_file() for known in read_catalog(file)}


def read_catalog(path: Path) -> list[Known]:
    """The entries of one catalog, in its order. Raises ConfigError."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise _fault(path, str(e)) from e
    return [_entry(path, name, table) for name, table in tables.items()]


def recognize(path: Path) -> Known | None:
    """The catalog's entry for the file at `path`, None if it has none. Only a file of a known size is hashed."""
    known = catalog()
    try:
        if path.stat().st_size not in {entry.size_bytes for entry in known.values()}:
            return None
        with path.open("rb") as f:
            return known.get(hashlib.file_digest(f, "sha256").hexdigest())
    except OSError:
        return None


def _entry(path: Path, name: str, table: object) -> Known:
    texts = ("source", "original", "licence", "architecture", "sha256")
    if not isinstance(table, dict) or set(table) != {*texts, "size_bytes"}:
        raise _fault(path, f"{name} must have {', '.join(texts)} and size_bytes, and nothing else")
    if not all(isinstance(table[key], str) for key in texts) or not isinstance(table["size_bytes"], int):
        raise _fault(path, f"{name}: size_bytes is a number of bytes, all else is text")
    if len(table["sha256"]) != DIGEST_LETTERS or set(table["sha256"]) - set("0123456789abcdef"):
        raise _fault(path, f"{name}: sha256 is {DIGEST_LETTERS} hexadecimal digits in small letters")
    return Known(name, **table)


def _fault(path: Path, why: str) -> ConfigError:
    return ConfigError(what=f"{path}: not a catalog of models", why=why, fix="correct the entry, or take it out")
