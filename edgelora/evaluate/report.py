"""The report of a task: one row for each file, one column for each line of COLUMNS, as Markdown and JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from edgelora.evaluate.cells import Measure
from edgelora.evaluate.metrics import title_of_metric
from edgelora.evaluate.protocols import Speed
from edgelora.evaluate.score import Score, Scored
from edgelora.evaluate.taken import task_measures


class Measured(Protocol):
    """What a line of the table is made from: a Row, or a CellResult."""

    @property
    def name(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def speed(self) -> Speed: ...
    def measure(self, key: str) -> Measure | None:
        """What was measured under this key; None where it was not."""
        ...


@dataclass(frozen=True)
class Row:
    """One way to run the task: a name, what it weighs on disk, how well and how fast it answers."""

    name: str
    size_bytes: int
    scored: Scored
    speed: Speed

    def measure(self, key: str) -> Measure | None:
        """`exact`, `loss`, or one of them of a group: `exact/known`; `right` by another metric than exact match."""
        name, _, group = key.partition("/")
        if name == "right" and self.scored.metric != "exact":
            return task_measures(self.scored).get(key)
        found = self.scored.groups.get(group) if group else self.scored.all
        if found is None or name not in ("exact", "loss"):
            return None
        return Measure(found.exact_match, found.exact_interval) if name == "exact" else Measure(found.loss)


@dataclass(frozen=True)
class Column:
    """A column: its title (and a short one for terminals), its value for a row or None, how that is written, and which
    way is better: 1 higher, -1 lower, 0 neither."""

    key: str
    title: str
    short: str
    value: Callable[[Any], float | None]
    write: Callable[[float], str]
    better: int = 0

    def of(self, row: Measured) -> float | None:
        """None also for what is no number."""
        value = self.value(row)
        return value if value is not None and math.isfinite(value) else None


def _percent(share: float) -> str:
    return f"{share:.0%}"


def _tenths(share: float) -> str:
    return f"{share:.1%}"


def _whole(number: float) -> str:
    return f"{number:.0f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s"


def _of(key: str) -> Callable[[Measured], float | None]:
    def value(row: Measured) -> float | None:
        found = row.measure(key)
        return None if found is None else found.value

    return value


def _speed(field: str) -> Callable[[Measured], float | None]:
    def value(row: Measured) -> float | None:
        found: float | None = getattr(row.speed, field)
        return found

    return value


COLUMNS: tuple[Column, ...] = (
    Column("size_mb", "size on disk", "size", lambda r: r.size_bytes / 1e6 or None, "{:.1f} MB".format, -1),
    Column("exact_match", "exact match", "exact", _of("exact"), _percent, 1),
    Column("exact_match_known", "known wordings", "known", _of("exact/known"), _percent, 1),
    Column("exact_match_new", "new wordings", "new", _of("exact/new"), _percent, 1),
    Column("right", "right answers", "right", _of("right"), _tenths, 1),
    Column("loss", "held-out loss", "loss", _of("loss"), "{:.3f}".format, -1),
    Column("kl", "KL to the reference", "KL", _of("kl"), "{:.4f}".format, -1),
    Column("same_top", "same top", "same top", _of("same_top"), _tenths, 1),
    Column("perplexity", "perplexity", "PPL", _of("perplexity"), "{:.3f}".format, -1),
    Column("bits_per_byte", "bits per byte", "bits/byte", _of("bits_per_byte"), "{:.4f}".format, -1),
    Column("prompt_tokens_per_s", "prompt tokens/s", "prompt t/s", _speed("prompt_tokens_per_s"), _whole, 1),
    Column("generation_tokens_per_s", "generation tokens/s", "gen t/s", _speed("generation_tokens_per_s"), _whole, 1),
    Column("first_token_s", "first token after", "first", _speed("first_token_seconds"), _seconds, -1),
    Column("switch_s", "adapter switch", "switch", _speed("switch_seconds"), lambda x: f"{1e3 * x:.1f} ms", -1),
    Column("peak_mb", "peak memory", "memory", lambda r: r.speed.peak_bytes / 1e6 or None, "{:.0f} MB".format, -1),
)


def shown_columns(rows: Sequence[Measured]) -> list[Column]:
    """Those that have a value in some row."""
    return [c for c in COLUMNS if any(c.of(row) is not None for row in rows)]


def best(column: Column, rows: Sequence[Measured]) -> float | None:
    """The best value of a column; None where none is better, or there is nothing to choose from."""
    values = [value for row in rows if (value := column.of(row)) is not None]
    if not column.better or len(values) < 2 or min(values) == max(values):
        return None
    return max(values) if column.better > 0 else min(values)


def title_by(column: Column, metric: str | None, *, short: bool = False) -> str:
    """A column's title; that of right answers says by which metric (a name of METRICS, or `pattern`) they are right."""
    if column.key == "right" and metric is not None:
        return title_of_metric(metric)
    return column.short if short else column.title


def cells(
    rows: Sequence[Measured], *, short: bool = False, only: Sequence[str] = (), metric: str | None = None
) -> tuple[list[str], list[list[str]]]:
    """Titles and text of the table, of all columns or `only` some; one that has no value in any row is left out.

    `metric`: by which answers are right, where it is the same of all.
    """
    shown = [column for column in shown_columns(rows) if not only or column.key in only]

    def text(column: Column, row: Measured) -> str:
        value = column.of(row)
        return "–" if value is None else column.write(value)

    return ["", *(title_by(c, metric, short=short) for c in shown)], [
        [row.name, *(text(c, row) for c in shown)] for row in rows
    ]


def metric_of(rows: Sequence[Row]) -> str | None:
    """The metric that says which answers are right; None where rows have several."""
    found = {row.scored.metric for row in rows}
    return found.pop() if len(found) == 1 else None


def markdown(rows: Sequence[Row]) -> str:
    """The table with the full titles."""
    titles, body = cells(rows, metric=metric_of(rows))
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each row with every column's value (null where it has none), and the scores behind them with their intervals."""
    return [
        {
            "name": row.name,
            **{c.key: c.of(row) for c in COLUMNS},
            "score": _score(row.scored.all),
            "groups": {name: _score(s) for name, s in row.scored.groups.items()},
            "load_seconds": row.speed.load_seconds,
        }
        for row in rows
    ]


def _score(s: Score) -> dict[str, Any]:
    return {
        "rows": s.n_rows, "exact": s.exact, "exact_match": s.exact_match, "exact_interval_95": list(s.exact_interval),
        "answer_tokens": s.n_tokens, "loss_nats": s.loss,
    }  # fmt: skip
