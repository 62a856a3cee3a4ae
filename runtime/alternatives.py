"""How likely alternatives are, for multiple choice: what all of them begin with is evaluated once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from edgelora.evaluate.divergence import Candidate
from edgelora.evaluate.protocols import Alternative
from runtime.binding import Context, Entry


def log_p(context: Context, alternatives: Sequence[Alternative]) -> list[np.ndarray]:
    """Of each alternative the log-probabilities (nats) of its ids from `first` on. Leaves the context empty.

    Each must fit into the context. Raises EngineError for logits that are not finite.
    """
    context.clear()
    shared = _shared(alternatives)
    begin = [Entry(token, i, 0, False) for i, token in enumerate(alternatives[0].ids[:shared])]
    for first in range(0, len(begin), context.n_batch):
        context.decode(begin[first : first + context.n_batch])
    found: list[np.ndarray] = []
    for some in _side_by_side(alternatives, shared, context):
        entries = [
            Entry(token, i, sequence, i >= one.first - 1)
            for sequence, one in enumerate(some, 1)
            for i, token in enumerate(one.ids[:-1])
            if i >= shared
        ]
        for sequence in range(1, len(some) + 1):
            context.copy(0, sequence)
        targets = [np.array(one.ids[one.first :]) for one in some]
        nll = Candidate(context.decode(entries), np.concatenate(targets)).nll
        found += np.split(-nll, np.cumsum([len(part) for part in targets])[:-1])
        for sequence in range(1, len(some) + 1):
            context.forget(sequence, 0)
    context.clear()
    return found


def _shared(alternatives: Sequence[Alternative]) -> int:
    """How many ids all begin with, and none of them predicts what is scored."""
    shared = min(one.first for one in alternatives) - 1
    for i in range(shared):
        if len({one.ids[i] for one in alternatives}) > 1:
            return i
    return shared


def _side_by_side(
    alternatives: Sequence[Alternative], shared: int, context: Context
) -> Iterator[Sequence[Alternative]]:
    """As many as there are sequences, and as fit into one decode, at a time."""
    some: list[Alternative] = []
    size = 0
    for one in alternatives:
        own = len(one.ids) - 1 - shared
        if some and (len(some) == context.n_sequences - 1 or size + own > context.n_batch):
            yield some
            some, size = [], 0
        some.append(one)
        size += own
    yield some
