"""Reading an answer that may be broken off: by Ctrl-C, or because whoever reads has enough."""

from __future__ import annotations

from collections.abc import Generator
from queue import SimpleQueue
from threading import Thread

from runtime.service import Piece, Stream

PATIENCE_S = 10.0  # for an answer to end once it is cancelled: a part of a long prompt is evaluated in one go


def read(stream: Stream) -> Generator[Piece, None, None]:
    """The pieces of an answer. Leave it early, or press Ctrl-C, and it is cancelled; its `usage` is there afterwards.

    Another thread reads the stream: Python raises KeyboardInterrupt wherever this one stands, and a service must not
    be left in the middle of something.
    """
    pieces: SimpleQueue[Piece | Exception | None] = SimpleQueue()
    reader = Thread(target=_pass_on, args=(stream, pieces), name="answer", daemon=True)
    reader.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            yield piece
    finally:
        if reader.is_alive():
            stream.cancel()  # safe for one that has just ended
            reader.join(PATIENCE_S)


def _pass_on(stream: Stream, pieces: SimpleQueue[Piece | Exception | None]) -> None:
    try:
        for piece in stream:
            pieces.put(piece)
        pieces.put(None)
    except Exception as e:  # raised again where the answer is read
        pieces.put(e)
