"""What stands before a prompt and is no token: it takes the first positions of a sequence, and reuse works as for
tokens."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from runtime.binding import Context


class Head(Protocol):
    """It takes the positions 0 … length - 1 of whatever sequence it is put into."""

    @property
    def length(self) -> int: ...

    def put(self, context: Context, sequence: int, first: int, last: int) -> None:
        """Make positions `first` to `last` (one behind) of a sequence hold it; what comes before `first` does so."""
        ...


class Embedded:
    """A soft prompt: float32 (n, d), evaluated as the embeddings of tokens are, adapters that are set included."""

    def __init__(self, embeddings: np.ndarray) -> None:
        self._embeddings = embeddings

    @property
    def length(self) -> int:
        return len(self._embeddings)

    def put(self, context: Context, sequence: int, first: int, last: int) -> None:
        for begin in range(first, last, context.n_batch):
            context.evaluate(self._embeddings[begin : min(begin + context.n_batch, last)], begin, sequence)
