"""Whether files are still what they were when a long job began to read them: by size, time of change and inode.

A base that is downloaded again, or trained anew, while it is merged would give a file that is half of each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgelora.errors import BaseModelError, OutputError
from edgelora.files.split import PART_NAME

Mark = tuple[int, int, int]  # bytes, time of the last change in ns, inode


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
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino
