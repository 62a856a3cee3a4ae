"""When an answer counts as right: THE TABLE of metrics for rows that are answered in words. One function each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from edgelora.errors import ConfigError, DataError

AUTO = "auto"
LONGEST_LABEL = 40  # characters
FEWEST_ROWS_PER_LABEL = 3
NUMBER = re.compile(r"####\s*([-+]?[\d.,\s]*\d)")  # as GSM8K marks its results
AROUND = " \t\r\n.,;:!?\"'`*()[]"  # what may stand around a label


@dataclass(frozen=True)
class Metric:
    """`right(answer, reference)`; `fits(references)`: whether a task's references are of this kind."""

    title: str
    right: Callable[[str, str], bool]
    fits: Callable[[Sequence[str]], bool]


def exact(answer: str, reference: str) -> bool:
    """The whole answer, white space at its ends trimmed."""
    return answer.strip() == reference.strip()


def same_json(answer: str, reference: str) -> bool:
    """The same value: the order of keys and white space do not count, that of a list does; 1 and 1.0 are equal, 1 and
    true are not. An answer in a ```json fence is read without it."""
    expected = _json(reference)
    found = _json(re.sub(r"\A\s*```(?:json)?\s*\n(.*?)\n?```\s*\Z", r"\1", answer, flags=re.DOTALL))
    return expected is not None and found is not None and _marked(found[0]) == _marked(expected[0])


def same_number(answer: str, reference: str) -> bool:
    """The number behind the last ####, commas and blanks in it left out."""
    expected, found = _number(reference), _number(answer)
    return expected is not None and expected == found


def same_label(answer: str, reference: str) -> bool:
    """A name out of a few: upper and lower case and the signs around it do not count."""
    return answer.strip(AROUND).casefold() == reference.strip(AROUND).casefold()


def pattern(regex: str) -> Metric:
    """Right is what has the same as the reference where `regex` first matches: its first group, or all of it.

    Raises ConfigError if it is no regular expression.
    """
    try:
        compiled = re.compile(regex)
    except re.error as e:
        raise ConfigError(
            what=f"--pattern {regex}: no regular expression",
            why=str(e),
            fix="write it as Python's re has it, such as 'Answer: (\\w+)'",
        ) from e

    def found(text: str) -> str | None:
        match = compiled.search(text)
        return None if match is None else (match[1] if compiled.groups else match[0])

    def right(answer: str, reference: str) -> bool:
        expected = found(reference)
        return expected is not None and found(answer) == expected

    return Metric(f"match of {regex}", right, lambda references: all(found(text) is not None for text in references))


def _has_json(references: Sequence[str]) -> bool:
    values = [_json(text) for text in references]
    return all(value is not None and isinstance(value[0], dict | list) for value in values)


def _has_numbers(references: Sequence[str]) -> bool:
    return all(_number(text) is not None for text in references)


def _has_labels(references: Sequence[str]) -> bool:
    few = len(set(references)) * FEWEST_ROWS_PER_LABEL <= len(references)
    return few and all(len(text) <= LONGEST_LABEL and "\n" not in text.strip() for text in references)


METRICS: dict[str, Metric] = {
    "json": Metric("JSON equality", same_json, _has_json),
    "number": Metric("number after ####", same_number, _has_numbers),
    "label": Metric("label accuracy", same_label, _has_labels),
    "exact": Metric("exact match", exact, lambda _: True),
}


def title_of_metric(name: str) -> str:
    """Of a name of METRICS, or `pattern`."""
    return METRICS[name].title if name in METRICS else "match of the pattern"


def choose_metric(references: Sequence[str], asked: str = AUTO, regex: str | None = None) -> tuple[str, Metric]:
    """The metric asked for, or the first of the table that fits every reference.

    Raises ConfigError for an unknown name, DataError where the metric asked for does not fit a reference.
    """
    if regex is not None:
        return _fitting("pattern", pattern(regex), references)
    if asked == AUTO:
        return next((name, metric) for name, metric in METRICS.items() if metric.fits(references))
    if asked not in METRICS:
        raise ConfigError(
            what=f"--metric {asked}: there is none of that name",
            why="it says when an answer counts as right",
            fix=f"choose one of {', '.join((AUTO, *METRICS))}, or pass --pattern REGEX",
        )
    return (asked, METRICS[asked]) if asked == "label" else _fitting(asked, METRICS[asked], references)


def _fitting(name: str, metric: Metric, references: Sequence[str]) -> tuple[str, Metric]:
    for number, reference in enumerate(references, 1):
        if not metric.fits([reference]):
            raise DataError(
                what=f"row {number}: its answer cannot be scored by {metric.title}",
                why=f"no answer could ever be right, since this is expected: {reference[:80]!r}",
                fix="choose another --metric, or mend the row",
            )
    return name, metric


def _json(text: str) -> tuple[Any] | None:
    """(value,), since None is a value too."""
    try:
        return (json.loads(text, parse_constant=_refuse),)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _marked(value: Any) -> Any:
    """Python finds True and 1 equal; JSON does not."""
    if isinstance(value, dict):
        return {key: _marked(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_marked(inner) for inner in value]
    return (bool, value) if isinstance(value, bool) else value


def _number(text: str) -> Decimal | None:
    found = NUMBER.findall(text)
    try:
        return Decimal(re.sub(r"[,\s]", "", found[-1])) if found else None
    except InvalidOperation:
        return None
