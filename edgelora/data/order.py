"""Which rows make up an optimizer step: a pure function of the seed and the step, over a mixture of sources."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


class Order:
    """Rows 0 … n of a data set, shuffled anew for each epoch; the same under the same seed, whatever was asked before.

    counts: rows of each source; they are numbered one source after the other. weights: how often each row of a source
    is seen in an epoch: 2 is twice, 0.5 a random half of them, another one each time. A step may span two epochs.
    """

    def __init__(
        self, counts: Sequence[int], batch_rows: int, seed: int, weights: Sequence[float] | None = None
    ) -> None:
        firsts = np.cumsum([0, *counts])[:-1].tolist()
        self._sources = [
            (first, n, *_times(n, weight))
            for first, n, weight in zip(firsts, counts, weights or [1.0] * len(counts), strict=True)
        ]
        self.batch_rows, self._seed = batch_rows, seed
        self.epoch_rows = sum(n * whole + part for _, n, whole, part in self._sources)
        assert self.epoch_rows, "no rows to order"
        self._restart()

    def rows(self, step: int) -> list[int]:
        """The numbers of the rows of a step, counted from 0.

        Forwards an epoch costs one shuffle of numbers, whether its steps are asked for or passed over. Backwards, over
        an epoch's border, the epochs are shuffled again from the first on.
        """
        first = step * self.batch_rows
        out: list[int] = []
        while len(out) < self.batch_rows:
            epoch, at = divmod(first + len(out), self.epoch_rows)
            out += self._shuffled(epoch)[at : at + self.batch_rows - len(out)].tolist()
        return out

    def n_steps(self, epochs: float, max_steps: int | None = None) -> int:
        """Enough steps that `epochs` passes leave no row out; at most `max_steps`."""
        total = n_steps(self.epoch_rows, self.batch_rows, epochs)
        return total if max_steps is None else min(total, max_steps)

    def epoch_at(self, step: int) -> float:
        """How often the data was seen before a step: 1.5 in the middle of the second time."""
        return step * self.batch_rows / self.epoch_rows

    def _restart(self) -> None:
        self._random = np.random.default_rng(self._seed)
        self._epoch, self._current = -1, np.empty(0, np.int64)

    def _shuffled(self, epoch: int) -> np.ndarray:
        if epoch < self._epoch:
            self._restart()
        while self._epoch < epoch:
            pool = np.concatenate([self._drawn(*source) for source in self._sources])
            self._current = pool[self._random.permutation(len(pool))]
            self._epoch += 1
        return self._current

    def _drawn(self, first: int, n: int, whole: int, part: int) -> np.ndarray:
        """The rows of a source in an epoch: all of them `whole` times, and `part` random ones once more."""
        more = self._random.permutation(n)[:part] if part else np.empty(0, np.int64)
        return first + np.concatenate([np.tile(np.arange(n), whole), np.sort(more)])


def _times(n: int, weight: float) -> tuple[int, int]:
    """How often all n rows are seen in an epoch, and how many of them once more; never none."""
    whole, part = int(weight), round((weight - int(weight)) * n)
    return whole, part if whole or part else min(n, 1)


def n_steps(n_rows: int, batch_rows: int, epochs: float) -> int:
    """Enough steps that `epochs` passes leave no row out."""
    return max(1, math.ceil(round(n_rows * epochs / batch_rows, 6)))
