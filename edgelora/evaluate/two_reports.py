"""Two reports of the same data beside each other: cell by cell, row by row. Reads no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgelora.errors import DataError
from edgelora.evaluate.against import against
from edgelora.evaluate.cells import WAYS, CellResult, Report, UsedFile, in_order
from edgelora.evaluate.measures import kind_of, title_of

SHOWN = 12  # characters of a digest
AS_LIVE = ("live", "patched", "torch")  # one of them is what a method can be, whatever it is: these are one pair


@dataclass(frozen=True)
class Pair:
    """One cell's measure in both reports, `after` beside `before`; `cell` says where it is live in another way."""

    cell: str
    measure: str
    before: str
    after: str
    change: str
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """`settings`: what differs in how they were measured; `files`: in what they were built from; `only_before` and
    `only_after`: cells that the other report lacks, or has no whole figures of."""

    pairs: tuple[Pair, ...]
    settings: tuple[str, ...]
    files: tuple[str, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_reports(before: Report, after: Report, names: tuple[str, str]) -> Comparison:
    """Raises DataError, which calls the reports by `names`, where their data is not the same."""
    _require_same_data(before, after, names)
    left, right = (_whole(report) for report in (before, after))
    both = {name: other for name, cell in left.items() if (other := _same_place(cell, left, right)) is not None}
    pairs = [
        _pair(key, left[name], other)
        for name, other in both.items()
        for key in left[name].measures if left[name].measure(key) and other.measure(key)
    ]  # fmt: skip
    found = {other.name for other in both.values()}
    return Comparison(
        tuple(pairs), tuple(_settings(before, after)), tuple(_files(before, after)),
        tuple(n for n in left if n not in both), tuple(n for n in right if n not in found),
    )  # fmt: skip


def _same_place(cell: CellResult, left: Mapping[str, CellResult], right: Mapping[str, CellResult]) -> CellResult | None:
    """The cell of the same name; else, of an adapter over the same level, the one that is live in another way."""
    if cell.name in right or cell.way not in AS_LIVE:
        return right.get(cell.name)
    others = [c for c in right.values() if c.quant == cell.quant and c.way in AS_LIVE and c.name not in left]
    return others[0] if len(others) == 1 else None


def _whole(report: Report) -> dict[str, CellResult]:
    return {cell.name: cell for cell in in_order(report.cells) if cell.status == "ok"}


def _pair(key: str, before: CellResult, after: CellResult) -> Pair:
    (found,) = against(before, after, [key])
    a, b, kind = before.measure(key), after.measure(key), kind_of(key)
    assert a is not None
    assert b is not None
    name = before.name if before.way == after.way else f"{before.name} → {WAYS[after.way]}"
    return Pair(name, title_of(key), kind.write(a.value), kind.write(b.value), found.written, found.verdict)


def _digests(files: Sequence[UsedFile]) -> dict[str, dict[str, str]]:
    """Role → digest → name."""
    found: dict[str, dict[str, str]] = {}
    for file in files:
        found.setdefault(file.role, {})[file.sha256] = file.path
    return found


def _require_same_data(before: Report, after: Report, names: tuple[str, str]) -> None:
    a, b = _digests(before.provenance.data), _digests(after.provenance.data)
    common = [role for role in a if role in b]
    differing = [
        f"{role}: {_said(a[role])} against {_said(b[role])}" for role in common if set(a[role]) != set(b[role])
    ]
    if differing or not common:
        raise DataError(
            what=f"{names[0]} and {names[1]} were measured on different data",
            why="; ".join(differing) or f"one has {', '.join(a) or 'none'}, the other {', '.join(b) or 'none'}",
            fix="measure both on the same files; only rows that both answered can be compared",
        )


def _said(files: Mapping[str, str]) -> str:
    return " + ".join(f"{name} (sha256 {digest[:SHOWN]}…)" for digest, name in sorted(files.items()))


def _files(before: Report, after: Report) -> list[str]:
    """What else the cells were built from: the base, adapters, the rows of an importance matrix."""
    a, b = _digests(before.provenance.files), _digests(after.provenance.files)
    return [
        f"{role}: {_said(a.get(role, {})) or '–'} → {_said(b.get(role, {})) or '–'}"
        for role in dict.fromkeys([*a, *b]) if set(a.get(role, ())) != set(b.get(role, ()))
    ]  # fmt: skip


def _settings(before: Report, after: Report) -> list[str]:
    """What else was not the same, so that a reader knows what a change may come from."""
    a, b = ({"CPU": r.provenance.cpu, "threads": r.provenance.threads, **r.provenance.versions, **r.provenance.settings}
            for r in (before, after))  # fmt: skip
    return [
        f"{key}: {a.get(key, '–')} → {b.get(key, '–')}" for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)
    ]
