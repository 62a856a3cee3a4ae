"""The report of a task: one row for each file, one column for each line of COLUMNS, as Markdown and JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edgelora.evaluate.protocols import Speed
from edgelora.evaluate.score import Score, Scored


@dataclass(frozen=True)
class Row:
    """One way to run the task: a name, what it weighs on disk, how well and how fast it answers."""

    name: str
    size_bytes: int
    scored: Scored
    speed: Speed


@dataclass(frozen=True)
class Column:
    """A column: its title (and a short one for terminals), its value for a row or None, and how that is written."""

    key: str
    title: str
    short: str
    value: Callable[[Row], float | None]
    write: Callable[[float], str]


def _percent(share: float) -> str:
    return f"{share:.0%}"


def _whole(number: float) -> str:
    return f"{number:.0f}"


def _group(name: str) -> Callable[[Row], float | None]:
    return lambda row: row.scored.groups[name].exact_match if name in row.scored.groups else None


COLUMNS: tuple[Column, ...] = (
    Column("size_mb", "size on disk", "size", lambda r: r.size_bytes / 1e6, lambda x: f"{x:.1f} MB"),
    Column("exact_match", "exact match", "exact", lambda r: r.scored.all.exact_match, _percent),
    Column("exact_match_known", "known wordings", "known", _group("known"), _percent),
    Column("exact_match_new", "new wordings", "new", _group("new"), _percent),
    Column("loss", "held-out loss", "loss", lambda r: r.scored.all.loss, lambda x: f"{x:.3f}"),
    Column("prompt_tokens_per_s", "prompt tokens/s", "prompt t/s", lambda r: r.speed.prompt_tokens_per_s, _whole),
    Column(
        "generation_tokens_per_s", "generation tokens/s", "gen t/s", lambda r: r.speed.generation_tokens_per_s, _whole
    ),
    Column("peak_mb", "peak memory", "memory", lambda r: r.speed.peak_bytes / 1e6, lambda x: f"{x:.0f} MB"),
)


def cells(rows: Sequence[Row], *, short: bool = False) -> tuple[list[str], list[list[str]]]:
    """Titles and text of the table; a column that has no value in any row is left out."""
    shown = [c for c in COLUMNS if any(c.value(row) is not None for row in rows)]

    def text(column: Column, row: Row) -> str:
        value = column.value(row)
        return "–" if value is None else column.write(value)

    return ["", *(c.short if short else c.title for c in shown)], [
        [row.name, *(text(c, row) for c in shown)] for row in rows
    ]


def markdown(rows: Sequence[Row]) -> str:
    """The table with the full titles."""
    titles, body = cells(rows)
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each row with every column's value (null where it has none), and the scores behind them with their intervals."""
    return [
        {
            "name": row.name,
            **{c.key: c.value(row) for c in COLUMNS},
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
