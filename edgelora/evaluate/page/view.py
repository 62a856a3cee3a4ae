"""What the page says, as text in tables: prepared once for HTML and Markdown. Escapes nothing and draws nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgelora.evaluate.against import against
from edgelora.evaluate.cells import CellResult, Measure, Report, in_order
from edgelora.evaluate.measures import MEASURES, kind_of, title_of
from edgelora.evaluate.pareto import frontier, goodness, ranked_by
from edgelora.evaluate.recommend import Choice, before
from edgelora.evaluate.report import best, shown_columns, title_by

NONE = "–"


@dataclass(frozen=True)
class Value:
    """What stands in a column of the table, in words."""

    text: str
    is_best: bool = False


@dataclass(frozen=True)
class TableRow:
    """`note`: why a cell failed or is partial."""

    name: str
    way: str
    values: tuple[Value, ...]
    note: str
    is_chosen: bool
    is_dominated: bool


@dataclass(frozen=True)
class Line:
    """A cell in one measure. `strip`: where interval and value lie between the least and the greatest, 0 to 1; a base
    alone does not widen it, and lies at its end where it is farther off."""

    name: str
    way: str
    value: str
    interval: str
    change: str
    verdict: str
    strip: tuple[float, float, float]


@dataclass(frozen=True)
class Section:
    """One measure of all cells; `about` as in MEASURES."""

    title: str
    about: str
    better: str
    note: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Change:
    """A general measure before and after."""

    name: str
    way: str
    before: str
    base: str
    after: str
    change: str
    verdict: str


@dataclass(frozen=True)
class SpeedLine:
    """A cell's speed in words: tokens/s of prompt and answer, each with its range, and the time to load."""

    name: str
    way: str
    prompt: str
    prompt_range: str
    generation: str
    generation_range: str
    load: str


@dataclass(frozen=True)
class Alike:
    """An answer, and who gave it: (cell, way)."""

    text: str
    who: tuple[tuple[str, str], ...]
    is_expected: bool
    """It is the reference to the letter."""


@dataclass(frozen=True)
class AnswersOf:
    """A prompt, the answer that was expected, and those that cells gave: equal ones once."""

    prompt: str
    reference: str
    given: tuple[Alike, ...]


def in_torch(report: Report) -> list[str]:
    """Why cells are torch's, each reason once; empty where there are none."""
    return list(dict.fromkeys(cell.why for cell in report.cells if cell.status == "ok" and not cell.ships))


def table(report: Report, choice: Choice) -> tuple[list[str], list[TableRow]]:
    """The titles of COLUMNS that have a value, and a line for each cell; only whole cells to ship can be best."""
    cells = in_order(report.cells)
    whole = [cell for cell in cells if cell.status == "ok" and cell.ships]
    columns = shown_columns(cells)
    tops = {column.key: best(column, whole) for column in columns}
    keys = ranked_by(whole)
    undominated = frontier(whole, keys[0]) if keys else []

    def values(cell: CellResult) -> tuple[Value, ...]:
        found = [(column, column.of(cell)) for column in columns]
        return tuple(
            Value(NONE)
            if value is None
            else Value(column.write(value), cell.status == "ok" and cell.ships and value == tops[column.key])
            for column, value in found
        )

    metric = report.provenance.settings.get("metric")
    return [title_by(column, str(metric) if metric else None) for column in columns], [
        TableRow(
            cell.name, cell.way, values(cell), "" if cell.status == "ok" else f"{cell.status}: {cell.why}",
            cell.name == choice.cell, bool(keys) and cell not in undominated,
        )
        for cell in cells
    ]  # fmt: skip


def sections(report: Report) -> list[Section]:
    """Every measure that was taken, in MEASURES' order, each cell beside the best of it."""
    cells = [cell for cell in in_order(report.cells) if cell.status != "failed"]
    keys = list(dict.fromkeys(key for cell in cells for key in cell.measures))
    names = list(MEASURES)
    return [
        section for key in sorted(keys, key=lambda key: names.index(key.partition("/")[0]))
        if (section := _section(cells, key))
    ]  # fmt: skip


def _section(cells: Sequence[CellResult], key: str) -> Section | None:
    with_it = [(cell, found) for cell in cells if (found := cell.measure(key))]
    whole = [cell for cell, _ in with_it if cell.status == "ok"]
    if not whole:
        return None
    top, kind = max(whole, key=lambda cell: goodness(cell, [key])), kind_of(key)
    near = [found for cell, found in with_it if cell.way != "base"] or [found for _, found in with_it]
    bounds = [bound for found in near for bound in _bounds(found)]
    lines = tuple(_line(cell, found, top, key, (min(bounds), max(bounds))) for cell, found in with_it)
    chance = next((found.chance for _, found in with_it if found.chance is not None), None)
    note = f"guessing gets {chance:.0%} right" if chance is not None else ""
    return Section(title_of(key), kind.about, "higher is better" if kind.better > 0 else "lower is better", note, lines)


def _line(cell: CellResult, found: Measure, top: CellResult, key: str, span: tuple[float, float]) -> Line:
    kind, beside = kind_of(key), against(top, cell, [key])[0]
    low, high = _bounds(found)
    interval = f"{kind.write(low)} … {kind.write(high)}" if found.interval_95 else NONE
    least, most = span
    low, at, high = (min(max((x - least) / ((most - least) or 1.0), 0.0), 1.0) for x in (low, found.value, high))
    verdict = "best" if cell is top else beside.verdict
    return Line(
        cell.name, cell.way, kind.write(found.value), interval, "" if cell is top else beside.written,
        verdict if cell.status == "ok" else cell.status, (low, at, high),
    )  # fmt: skip


def _bounds(found: Measure) -> tuple[float, float]:
    bounds = [bound for bound in found.interval_95 or () if math.isfinite(bound)] + [found.value]
    return min(bounds), max(bounds)


def forgetting(report: Report) -> list[tuple[str, list[Change]]]:
    """General ability, measure by measure, with the adapter beside the base alone: of the same quantization if that was
    measured, else the largest."""
    whole = [cell for cell in in_order(report.cells) if cell.status == "ok"]
    bases = [cell for cell in whole if cell.way == "base"]
    keys = [key for key in dict.fromkeys(key for cell in whole for key in cell.measures) if _is_general(key)]
    found = []
    for key in keys:
        measured = [base for base in bases if base.measure(key)]
        after = [cell for cell in whole if cell.way != "base" and cell.measure(key)]
        if measured and after:
            found.append((title_of(key), [_change(before(cell, measured), cell, key) for cell in after]))
    return found


def _is_general(key: str) -> bool:
    return kind_of(key).about == "general"


def _change(base: CellResult, cell: CellResult, key: str) -> Change:
    change, kind = against(base, cell, [key])[0], kind_of(key)
    before, after = base.measure(key), cell.measure(key)
    assert before is not None
    assert after is not None
    return Change(
        cell.name, cell.way, kind.write(before.value), base.name, kind.write(after.value),
        change.written, change.verdict,
    )  # fmt: skip


def speeds(report: Report) -> list[SpeedLine]:
    """Of every cell whose repeats are known."""

    def write(value: float, form: str = "{:.0f}") -> str:
        return form.format(value) if math.isfinite(value) else NONE

    def spread(found: tuple[float, float] | None) -> str:
        return NONE if found is None else f"{write(found[0])} … {write(found[1])}"

    return [
        SpeedLine(
            cell.name, cell.way, write(s.prompt_tokens_per_s), spread(s.prompt_range),
            write(s.generation_tokens_per_s), spread(s.generation_range), write(s.load_seconds, "{:.2f} s"),
        )
        for cell in in_order(report.cells) if (s := cell.speed).prompt_range or s.generation_range
    ]  # fmt: skip


def answers(report: Report) -> list[AnswersOf]:
    """Of each sample, like answers as one."""
    cells = [cell for cell in in_order(report.cells) if cell.samples]
    found = []
    for i, sample in enumerate(report.samples):
        given: dict[str, list[tuple[str, str]]] = {}
        for cell in cells:
            if i < len(cell.samples):
                given.setdefault(cell.samples[i].strip(), []).append((cell.name, cell.way))
        expected = sample.reference.strip()
        alike = [Alike(text, tuple(who), text == expected) for text, who in given.items()]
        found.append(
            AnswersOf(sample.prompt, sample.reference, tuple(sorted(alike, key=lambda one: not one.is_expected)))
        )
    return found


def printable(text: str) -> str:
    """What cannot be seen is written out, so that an answer shows as it is and changes nothing around it."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
