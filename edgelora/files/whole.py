"""Read a whole file as it was at one moment, through one descriptor: what happens to it afterwards changes nothing."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from edgelora.errors import FileFormatError


@dataclass(frozen=True)
class Whole:
    """The bytes of a file, and its state when they were read."""

    content: bytes = field(repr=False)
    state: os.stat_result


def read_whole(path: Path, limit_bytes: int) -> Whole:
    """All bytes of the file at `path`, which are at most `limit_bytes`.

    Raises FileFormatError if it cannot be read, is larger, is no file, or was changed meanwhile.
    """
    try:
        with open(path, "rb", buffering=0, opener=_at_once) as f:
            before = os.fstat(f.fileno())
            if not stat.S_ISREG(before.st_mode):
                raise _fault(path, "it is a pipe or a device, not a file", "pass a file")
            if before.st_size > limit_bytes:
                raise _fault(path, f"its {before.st_size:,} bytes are more than the {limit_bytes:,} allowed here")
            content = f.read()
            after = os.fstat(f.fileno())
    except OSError as e:
        raise _fault(path, e.strerror or str(e), "check the spelling of the path, and who may read it") from e
    if (len(content), _times(before)) != (before.st_size, _times(after)):
        raise _fault(path, "it changed while it was read", "wait until the other program has finished with it")
    return Whole(content, before)


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a named pipe would be waited for


def _times(state: os.stat_result) -> tuple[int, int]:
    return state.st_mtime_ns, state.st_ctime_ns


def _fault(path: Path, why: str, fix: str = "pass another file") -> FileFormatError:
    return FileFormatError(what=f"{path}: cannot be read", why=why, fix=fix)
