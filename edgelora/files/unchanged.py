"""Whether files are still what they were when a long job began to read them: size, time of change, inode and bytes.

A base that is downloaded again, or trained anew, while it is merged would give a file that is half of each. Of a large
file not all bytes are read twice: a time that was set back gives itself away in blocks from all over it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from edgelora.errors import BaseModelError, OutputError
from edgelora.files.split import PART_NAME

BLOCK, BLOCKS = 1 << 16, 64  # what is read of a file: 4 MiB, its first and last bytes among them; of a smaller one all

Mark = tuple[int, int, int, bytes]  # bytes, time of the last change in ns, inode, SHA-256 of the blocks


@dataclass(frozen=True)
class Stamps:
    """How files stood at one moment; None for one that was not there."""

    marks: Mapping[Path, Mark | None]

    def require_unchanged(self) -> None:
        """Raise BaseModelError, which names them all, if files are others now."""
        changed = [path for path, mark in self.marks.items() if _mark(path) != mark]
        if changed:
            raise BaseModelError(
                what=f"{', '.join(map(str, changed))}: changed while it was read",
                why="the result would be partly of the old file and partly of the new one; it was thrown away",
                fix="wait until the other program has finished with it, then run the command again",
            )

    def require_apart(self, *results: Path) -> None:
        """Raise OutputError if something that is to be written would take the place of one of the files."""
        for path in results:
            place = path.resolve()
            for file in self.marks:
                whole = file.resolve()
                if place == whole or place in whole.parents:
                    raise OutputError(
                        what=f"{path}: it would be written over {file}",
                        why="that is what it is made from, and would be gone",
                        fix="choose another name for the result",
                    )


def stamp(*paths: Path) -> Stamps:
    """The files at `paths` as they stand: of a folder all that lie in it, of a split model all its parts."""
    return Stamps({file: _mark(file) for path in paths for file in _files(path)})


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.is_file())
    if part := PART_NAME.fullmatch(path.name):
        return sorted(path.parent.glob(f"{_literal(part['stem'])}-?????-of-{part['count']}.gguf"))
    return [path]


def _literal(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _mark(path: Path) -> Mark | None:
    try:
        with path.open("rb") as f:
            found = os.fstat(f.fileno())
            return found.st_size, found.st_mtime_ns, found.st_ino, _digest(f, found.st_size)
    except OSError:
        return None


def _digest(file: BinaryIO, size: int) -> bytes:
    digest, apart = hashlib.sha256(), max(BLOCK, (size - BLOCK) // (BLOCKS - 1))
    for at in range(0, size, apart):
        file.seek(at)
        digest.update(file.read(BLOCK))
    file.seek(max(0, size - BLOCK))
    digest.update(file.read(BLOCK))
    return digest.digest()
