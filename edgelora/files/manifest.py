"""A folder that says what it holds: `manifest.json` has the size and SHA-256 of every file beside it.

Finds what accidents do to a folder (torn, truncated, flipped, missing, added); it is no signature.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgelora.errors import FileFormatError, some
from edgelora.files.checkpoint import read_json
from edgelora.files.contract import sha256_file

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 10


class Entry(BaseModel):
    """What must be true of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)


PlainName = Annotated[str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]  # nothing that leads out of the folder


class Manifest(BaseModel):
    """The files of a folder by name, the manifest itself left out."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    files: dict[PlainName, Entry] = Field(min_length=1)

    def to_bytes(self) -> bytes:
        return (self.model_dump_json(indent=2) + "\n").encode()


def write_manifest(folder: Path) -> None:
    """Describe the files of `folder`, which holds plain files and no folders; the last file to be written there."""
    paths = sorted(folder.iterdir())
    entries = {p.name: Entry(sha256=sha256_file(p), size_bytes=p.stat().st_size) for p in paths}
    (folder / MANIFEST).write_bytes(Manifest(files=entries).to_bytes())


def verify(folder: Path) -> None:
    """Raise FileFormatError, with all faults together, unless `folder` holds what its manifest says and nothing else.

    Safe on a stranger's folder: no name leads out of it, and no file is read that is not as long as it should be.
    """
    try:
        found = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(folder)}
    except OSError as e:
        raise _damaged(folder, f"it is no folder that can be read ({e.strerror})") from e
    wanted = _read(folder).files
    found.pop(MANIFEST, None)
    faults = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    faults += [f"{name[:80]!a} does not belong here" for name in sorted(found.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & found.keys()):
        if fault := _fault(folder / name, found[name], wanted[name]):
            faults.append(f"{name} {fault}")
    if faults:
        raise _damaged(folder, some(faults))


def _read(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate(read_json(path, MAX_MANIFEST_BYTES))
        if path.read_bytes() != manifest.to_bytes():  # one content has one text: any other was not written by us
            raise _damaged(folder, f"{MANIFEST} was altered")
    except ValidationError as e:
        raise _damaged(folder, f"{MANIFEST} is no list of plain files, their sizes and SHA-256") from e
    except OSError as e:
        raise _damaged(folder, f"{MANIFEST} cannot be read ({e.strerror})") from e
    return manifest


def _fault(path: Path, found: os.stat_result, wanted: Entry) -> str:
    if not stat.S_ISREG(found.st_mode):
        return "is no regular file"
    if found.st_size != wanted.size_bytes:
        return f"has {found.st_size} bytes instead of {wanted.size_bytes}"
    try:
        return "" if sha256_file(path) == wanted.sha256 else "was altered"
    except OSError as e:
        return f"cannot be read ({e.strerror})"


def _damaged(folder: Path, why: str) -> FileFormatError:
    return FileFormatError(what=f"{folder}: damaged", why=why, fix="delete this folder, and use another copy of it")
