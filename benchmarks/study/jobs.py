"""What there is to do, as a pure function of what is done: each job with the results it needs and those it makes.

A result's key says everything that it depends on, so that a study goes on wherever it was stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from study.ways import (
    BEFORE,
    BEYOND,
    CHECK_SEED,
    CHECK_TASK,
    CHECKED_AT,
    F16,
    IMATRIX,
    LIVE,
    LOFTQ,
    OWN,
    QUANTS,
    RATES,
    SEEDS,
    TASKS,
    Way,
    ways,
)  # fmt: skip

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """`kind`: base, train, imatrix or score. `makes`: keys of its results, in that order; `needs`: of others'."""

    kind: str
    makes: tuple[str, ...]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One figure of the study: a way at a level, on a task, with a seed. `rows`: test, or valid where a learning rate
    is chosen."""

    task: str
    way: int
    quant: str
    seed: int
    rate: float
    rows: str = "test"

    @property
    def key(self) -> str:
        return f"{self.rows}/{self.task}/{self.way}/{self.quant}/{self.seed}/{self.rate:g}"

    @classmethod
    def read(cls, key: str) -> Cell:
        rows, task, way, quant, seed, rate = key.split("/")
        return cls(task, int(way), quant, int(seed), float(rate), rows)


def trained(cell: Cell, way: Way) -> str:
    """The key of the training behind a cell."""
    over = {OWN: cell.quant, LOFTQ: f"{LOFTQ}-{cell.quant}"}.get(way.over, way.over)
    return f"train/{cell.task}/{over}/{cell.seed}/{cell.rate:g}"


def importance(cell: Cell) -> str:
    return f"imatrix/{cell.task}/{cell.seed}/{cell.rate:g}"


def base(quant: str) -> str:
    return f"base/{quant}"


def plan(found: Results, ways: Iterable[Way], *, guess: bool = False) -> list[Job]:
    """All jobs that are known so far, in the order in which they should be done.

    A way's cells are known when its learning rate is chosen; `guess`: take the middle one where it is not, to count.
    """
    ways = tuple(ways)
    jobs = [Job("base", (base(F16),)), *(Job("base", (base(quant),), (base(F16),)) for quant in QUANTS)]
    checks = [cell for quant in sorted(set(CHECKED_AT.values())) for cell in _checks(found, ways, quant)]
    jobs += _jobs_of(checks, ways)
    for seed in SEEDS:
        for task in TASKS:
            cells = []
            for way in (BEFORE, *ways):
                for quant in (F16,) if way is BEFORE else QUANTS:
                    rate = chosen_rate(found, way, quant) or (RATES[len(RATES) // 2] if guess else None)
                    if rate is not None:
                        cells.append(Cell(task.name, way.number, quant, seed, rate))
            jobs += _jobs_of(cells, ways)
    return list({job.makes: job for job in reversed(jobs)}.values())[::-1]


def plan_of_all(found: Results, /, *, guess: bool = False) -> list[Job]:
    """`plan` of the ways that this version of edgelora can train."""
    return plan(found, ways(), guess=guess)


def _checks(found: Results, ways: Iterable[Way], at: str) -> list[Cell]:
    cells = [check(way, at, rate) for way in ways for rate in rates_tried(found, way, at)]
    return sorted(cells, key=lambda cell: cell.rate)


def check(way: Way, at: str, rate: float) -> Cell:
    """Where a learning rate is tried. What nothing was quantized of takes that of the same adapter, live."""
    number = 2 if way is BEFORE else way.number
    return Cell(CHECK_TASK.name, number, at, CHECK_SEED, rate, "valid")


def rates_tried(found: Results, way: Way, at: str) -> tuple[float, ...]:
    """RATES, and the one beyond where the best of them is at the edge."""
    best = _best(found, way, at, RATES)
    return RATES if best is None else (*RATES, *BEYOND.get(best, ()))


def chosen_rate(found: Results, way: Way, quant: str) -> float | None:
    """The learning rate of the lowest validation loss, of those that could be trained; None before all were tried."""
    at = CHECKED_AT.get(quant, "Q4_K_M")
    return _best(found, way, at, rates_tried(found, way, at))


def _best(found: Results, way: Way, at: str, rates: Iterable[float]) -> float | None:
    losses = {rate: found[key].get("loss", math.inf) for rate in rates if (key := check(way, at, rate).key) in found}
    return min(losses, key=losses.__getitem__) if set(losses) == set(rates) else None


def _jobs_of(cells: Iterable[Cell], ways: Iterable[Way]) -> Iterator[Job]:
    """Trainings first, then importance, then scores: of one level and one base, in one process."""
    by_number = {way.number: way for way in (BEFORE, *ways)}
    trainings: dict[str, Job] = {}
    matrices: dict[str, Job] = {}
    scores: dict[tuple[Any, ...], list[tuple[str, list[str]]]] = {}
    for cell in cells:
        way = by_number[cell.way]
        adapter = trained(cell, way)
        over = {OWN: cell.quant, LOFTQ: cell.quant}.get(way.over, F16)
        trainings[adapter] = Job("train", (adapter,), tuple({base(over): 0, base(F16): 0}))
        needs = [adapter]
        if way.served == IMATRIX:
            needs.append(importance(cell))
            matrices[needs[-1]] = Job("imatrix", (needs[-1],), (adapter,))
        group = (cell.quant, way.served == LIVE, cell.seed, cell.task, cell.rate if cell.rows == "valid" else 0)
        scores.setdefault(group, []).append((cell.key, [base(cell.quant), *needs]))
    yield from trainings.values()
    yield from matrices.values()
    for several in scores.values():
        needed = dict.fromkeys(key for _, needs in several for key in needs)
        yield Job("score", tuple(key for key, _ in several), tuple(needed))


def ready(jobs: Iterable[Job], found: Results, busy: Iterable[str]) -> Iterator[Job]:
    """Jobs that can be done now, without what was made already. `busy`: keys that are being made."""
    taken = set(busy)
    for job in jobs:
        missing = tuple(key for key in job.makes if key not in found and key not in taken)
        if missing and all(key in found for key in job.needs):
            yield Job(job.kind, missing, job.needs)
