"""One cell beside another, measure by measure: the change, how sure it is, and whether it is one for the worse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgelora.evaluate.cells import CellResult, Measure
from edgelora.evaluate.measures import difference, kind_of, title_of
from edgelora.evaluate.paired import LEVEL

NEGLIGIBLE_NATS = 0.02  # a token: 2 % of perplexity. With text enough, differences are clear that do not matter


@dataclass(frozen=True)
class Against:
    """A cell beside the best, in one measure: `change` (NaN: not measured), its interval where rows could be paired,
    and for right and wrong McNemar's p-value. `is_apart`: the interval does not hold 0."""

    key: str
    change: float
    interval_95: tuple[float, float] | None
    is_apart: bool
    p_value: float | None = None

    @property
    def is_worse(self) -> bool:
        """Errs on the side of the better file: McNemar's test may still find too few rows to be sure."""
        kind = kind_of(self.key)
        harm = -kind.better * self.change
        return self.is_apart and not harm <= (NEGLIGIBLE_NATS if kind.in_nats else 0)  # NaN is worse than anything

    @property
    def is_behind(self) -> bool:
        """By however little."""
        return self.is_apart and -kind_of(self.key).better * self.change > 0

    @property
    def verdict(self) -> str:
        """In two words: `equal`, `within noise`, `clearly worse` … or `probably`, where McNemar's test is not sure."""
        if math.isnan(self.change):
            return "not measured"
        if not self.is_apart:
            return "equal" if self.change == 0 and self.interval_95 in (None, (0, 0)) else "within noise"
        kind = kind_of(self.key)
        if kind.in_nats and abs(self.change) <= NEGLIGIBLE_NATS:
            return "too little to matter"
        sure = "clearly" if self.p_value is None or self.p_value < LEVEL else "probably"
        return f"{sure} {'better' if kind.better * self.change > 0 else 'worse'}"

    @property
    def written(self) -> str:
        """The change in its unit, with its interval."""
        if math.isnan(self.change):
            return "not measured"
        if self.change == 0 and self.interval_95 == (0, 0):
            return "equal in each row"
        kind = kind_of(self.key)
        factor, unit = (100, " points") if kind.better > 0 else (1, " nats" if kind.in_nats else "")
        digits = 1 if kind.better > 0 else 3
        value, *bounds = (
            f"{x * factor:+.{digits}f}".replace("-", "−") for x in (self.change, *(self.interval_95 or ()))
        )
        return f"{value}{unit}" + (f" (95 %: {bounds[0]} … {bounds[1]})" if bounds else "")

    def __str__(self) -> str:
        return f"{title_of(self.key)} {self.written}"


def against(best: CellResult, cell: CellResult, keys: Sequence[str]) -> list[Against]:
    """`cell` beside `best`, in each of `keys` that `best` has."""
    return [_against(key, a, cell.measure(key)) for key in keys if (a := best.measure(key)) is not None]


def _against(key: str, a: Measure, b: Measure | None) -> Against:
    if b is None:
        return Against(key, math.nan, None, is_apart=True)
    paired = difference(key, a, b)
    if paired is not None:
        low, high = paired.interval_95
        return Against(key, paired.value, paired.interval_95, not low <= 0 <= high, paired.p_value)
    scale = kind_of(key).scale
    apart = a.value != b.value
    if a.interval_95 and b.interval_95:  # the rows are not the same: only intervals apart are told apart
        apart = a.interval_95[1] < b.interval_95[0] or b.interval_95[1] < a.interval_95[0]
    return Against(key, scale(b.value) - scale(a.value), None, apart)
