"""One process at a time: a lock that the kernel frees when its holder dies, however it dies. POSIX only."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgelora.errors import OutputError


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` for the block. The file stays: deleting it would let a second run in beside the first.

    Raises OutputError, with the holder's process id, if another process (or this one) holds it, and if no lock can be
    had there. Child processes that are started by exec do not inherit it.
    """
    # No link is followed: the lock of a folder that came from elsewhere could empty any file of the user's.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
    except OSError as e:
        raise _no_lock(path, e) from e
    with file:
        try:
            # flock, not lockf: that one is lost as soon as anything in this process closes the same file
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        except BlockingIOError as e:
            holder = file.read(20)
            raise OutputError(
                what=f"{path.parent}: a run is at work here (process {int(holder) if holder.isdigit() else 'unknown'})",
                why="two runs in one folder would overwrite each other's checkpoints",
                fix="wait until it ends, or choose another --out",
            ) from e
        except OSError as e:
            raise _no_lock(path, e) from e
        yield


def _no_lock(path: Path, error: OSError) -> OutputError:
    return OutputError(
        what=f"{path}: cannot be locked ({error.strerror})",
        why="a run writes only into a folder that no other run writes into, and this one cannot tell",
        fix="choose an --out on a disk of this machine that you may write to",
    )
