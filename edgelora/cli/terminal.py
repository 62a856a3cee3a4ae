"""Standard output and error that outlive who reads them: a closed terminal, or a `tee` that Ctrl-C ended too.

A write would fail there, in the midst of the step that a run was to finish, and its exit code would be another. Behind
what takes no more, a full disk, it fails once, in three lines.
"""

from __future__ import annotations

import errno
import io
import signal
import sys
from typing import TYPE_CHECKING, TextIO

from edgelora.errors import OutputError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class Outliving(io.FileIO):
    """Writes to a descriptor; to nothing where nobody reads any more: behind a closed terminal, behind a closed pipe
    once the command was asked to stop, and wherever it has failed before.

    Raises OSError for a closed pipe, and OutputError for whatever else cannot be written.
    """

    stopping = False
    """Of all of them: whether the command ends because it was asked to."""
    _gone = False

    def write(self, data: ReadableBuffer, /) -> int:
        if not self._gone:
            try:
                return super().write(data)
            except OSError as e:
                self._gone = True
                if e.errno == errno.EPIPE and not (self.stopping or _asked()):
                    raise
                if e.errno not in (errno.EIO, errno.EPIPE):
                    raise _full(e, self.fileno()) from e
        return memoryview(data).nbytes


def _full(fault: OSError, descriptor: int) -> OutputError:
    return OutputError(
        what=f"standard {'error' if descriptor == 2 else 'output'} cannot be written: {fault.strerror}",
        why="the file or disk behind it takes no more, and what it did not take is lost",
        fix="make room there or send it elsewhere, and give the command again",
    )


def outlive() -> None:
    """Have sys.stdout and sys.stderr outlive who reads them, from now on. On Windows they are no files as here."""
    if hasattr(signal, "SIGHUP"):
        sys.stdout, sys.stderr = _outliving(sys.stdout), _outliving(sys.stderr)


def _outliving(stream: TextIO) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper):  # there is none, or somebody's own
        return stream
    raw = Outliving(stream.fileno(), "wb", closefd=False)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw), encoding=stream.encoding, errors=stream.errors,
        newline="\n", line_buffering=stream.line_buffering, write_through=stream.write_through,
    )  # fmt: skip


def _asked() -> bool:
    """Whether a training was asked to stop, and has still to end its step."""
    from edgelora.training.interrupt import Interrupt

    handler = signal.getsignal(signal.SIGINT)
    return isinstance(handler, Interrupt) and handler.asked is not None
