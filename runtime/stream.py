"""An answer on its way from the owner's thread to whoever asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import SimpleQueue

from edgelora.errors import EdgeloraError
from runtime.service import Piece, Usage


class LiveStream:
    """Iterate once, to the end. Leaving the loop early cancels the answer; `usage` is there when it has ended."""

    def __init__(self, cancel: Callable[[LiveStream], None]) -> None:
        self._pieces: SimpleQueue[Piece | EdgeloraError | None] = SimpleQueue()
        self._cancel, self._usage = cancel, None

    _usage: Usage | None

    @property
    def usage(self) -> Usage | None:
        return self._usage

    def __iter__(self) -> Iterator[Piece]:
        try:
            while (piece := self._pieces.get()) is not None:
                if isinstance(piece, EdgeloraError):
                    raise piece
                yield piece
        finally:
            self._pieces.put(None)  # whoever iterates again finds the end
            if self._usage is None:
                self.cancel()

    def cancel(self) -> None:
        """End the answer where it is: what was computed comes, then the end. Not an error, and safe to repeat."""
        self._cancel(self)

    # -- the owner's side -----------------------------------------------------------------------------------------

    def give(self, piece: Piece) -> None:
        """One more piece."""
        self._pieces.put(piece)

    def end(self, usage: Usage) -> None:
        """No piece comes any more."""
        self._usage = usage
        self._pieces.put(None)

    def fail(self, error: EdgeloraError) -> None:
        """The answer ends with this error, raised where it is iterated."""
        self._pieces.put(error)
