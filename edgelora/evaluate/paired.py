"""Whether two models differ on the same rows: an interval of the difference, and a test that needs no assumption.

Rows that both answer alike say nothing about the difference, so it is far smaller than two separate intervals suggest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

DRAWS, AT_ONCE = 10_000, 500
LEVEL = 0.05


@dataclass(frozen=True)
class Difference:
    """b − a, its 95 % interval (paired percentile bootstrap, Efron 1979), and for right and wrong the exact p-value of
    McNemar's test (1947): how likely so uneven a split of the rows where they differ is by chance."""

    value: float
    interval_95: tuple[float, float]
    p_value: float | None = None

    @property
    def is_clear(self) -> bool:
        """Whether chance alone would seldom (in 5 % of cases) make this difference."""
        low, high = self.interval_95
        return not low <= 0 <= high if self.p_value is None else self.p_value < LEVEL


def of_shares(a: Sequence[bool], b: Sequence[bool]) -> Difference:
    """Of the shares of right answers to the same rows, in the same order."""
    left, right = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return Difference(*_bootstrap(right - left, np.ones(len(left))), mcnemar(a, b))


def of_means(a: Sequence[float], b: Sequence[float], weights: Sequence[float] | None = None) -> Difference:
    """Of means over the same rows; `weights`: what each row's value is a sum over, such as its tokens."""
    left, right = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return Difference(*_bootstrap(right - left, np.ones(len(left)) if weights is None else np.asarray(weights, float)))


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """The exact two-sided p-value of McNemar's test."""
    _require_same_rows(a, b)
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    n, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, float(Fraction(2 * tail, 2**n)))  # whole numbers: no rounding, however many rows


def _bootstrap(differences: np.ndarray, weights: np.ndarray) -> tuple[float, tuple[float, float]]:
    """The weighted mean's difference: sums of `differences` over sums of `weights`, rows drawn again."""
    _require_same_rows(differences, weights)
    draw, n = np.random.default_rng(0), len(differences)
    drawn = np.empty(DRAWS)
    for first in range(0, DRAWS, AT_ONCE):
        counts = draw.multinomial(n, np.full(n, 1 / n), AT_ONCE)  # how often each row was drawn
        drawn[first : first + AT_ONCE] = (counts @ differences) / (counts @ weights)
    low, high = np.quantile(drawn, (LEVEL / 2, 1 - LEVEL / 2))
    return float(differences.sum() / weights.sum()), (float(low), float(high))


def _require_same_rows(a: Sequence[object] | np.ndarray, b: Sequence[object] | np.ndarray) -> None:
    if len(a) != len(b) or not len(a):
        raise ValueError(f"{len(a)} and {len(b)} rows are not the same rows")
