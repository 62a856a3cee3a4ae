"""Which rows share a micro-batch, where some belong together and a beginning that all share is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgelora.data.encode import Example

# What a micro-batch costs beside its tokens, in tokens: every frozen weight is dequantized for each. Two passes over
# the blocks of a 135M model take 50 ms of the 2 s that 768 tokens take; a GPU has more to lose, so it is rounded up.
BATCH_COST = 64
LOOK_BACK = 64  # only so many of the last opened are tried, so that thousands of rows take no longer than they must


@dataclass(frozen=True)
class _Fill:
    """What is in one micro-batch."""

    units: tuple[int, ...]
    n_examples: int
    length: int  # of all examples, end to end
    beginning: np.ndarray  # the ids that all of them begin with, before any of them learns

    @property
    def tokens(self) -> int:
        return self.length - (self.n_examples - 1) * len(self.beginning)

    def __add__(self, other: _Fill) -> _Fill:
        return _Fill(
            self.units + other.units, self.n_examples + other.n_examples, self.length + other.length,
            _common(self.beginning, other.beginning),
        )  # fmt: skip


def fit(units: Sequence[Sequence[Example]], max_tokens: int) -> list[list[int]]:
    """The units (by number) of each micro-batch of at most `max_tokens` tokens. The examples of a unit stay together.

    Longest first, each to where it adds the least to compute: into a micro-batch that begins like it and has room, or
    into one of its own, which costs BATCH_COST besides. So pairs with long prompts stay alone and share theirs, and
    short ones are packed. A unit longer than `max_tokens` is alone. Deterministic.
    """
    singles = [_unit(number, examples) for number, examples in enumerate(units)]
    fills: list[_Fill] = []
    for single in sorted(singles, key=lambda fill: fill.length, reverse=True):
        best, least = len(fills), single.tokens + BATCH_COST
        grown = single
        for at in range(max(0, len(fills) - LOOK_BACK), len(fills)):
            joined = fills[at] + single
            added = joined.tokens - fills[at].tokens
            if joined.tokens <= max_tokens and added < least:
                best, least, grown = at, added, joined
        fills[best : best + 1] = [grown]
    return [list(fill.units) for fill in fills]


def _unit(number: int, examples: Sequence[Example]) -> _Fill:
    before = [e.input_ids[: max(0, int(np.argmax(e.loss_mask)) - 1)] for e in examples]
    beginning = before[0]
    for ids in before[1:]:
        beginning = _common(beginning, ids)
    return _Fill((number,), len(examples), sum(map(len, examples)), beginning)


def _common(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    n = min(len(a), len(b))
    differing = np.flatnonzero(a[:n] != b[:n])
    return a[: int(differing[0]) if len(differing) else n]
