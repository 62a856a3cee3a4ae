"""What there is to do, as a pure function of what is done, in an order in which a part of it is a table already."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from study.jobs import Job, Results

from learning.rows import (
    BEYOND,
    CHECK_SEED,
    CHECK_TASK,
    FACTORS,
    ORIGINAL,
    Q4_0,
    Q4_1,
    REST,
    SEEDS,
    TASKS,
    UNTIED,
    Row,
    rows,
)

NEEDS = {
    Q4_1: (),
    UNTIED: (f"base/{UNTIED}",),
    Q4_0: (f"base/{ORIGINAL}", f"base/{Q4_0}"),
    REST: (f"base/{ORIGINAL}", f"base/{REST}"),
}


@dataclass(frozen=True)
class Training:
    """One training and its score. `factor`: of the learning rate, times the method's own."""

    task: str
    row: str
    seed: int
    factor: float

    @property
    def key(self) -> str:
        return f"train/{self.task}/{self.row}/{self.seed}/{self.factor:.3g}"

    @property
    def is_check(self) -> bool:
        """Whether it is among those of which the learning rate is chosen."""
        return (self.task, self.seed) == (CHECK_TASK.name, CHECK_SEED)

    @classmethod
    def read(cls, key: str) -> Training:
        _, task, row, seed, digits = key.split("/")
        factor = min((*FACTORS, *BEYOND.values()), key=lambda one: abs(one - float(digits)))
        return cls(task, row, int(seed), factor)


def before(task: str, over: str) -> str:
    """The key of what a base says without any training."""
    return f"before/{task}/{over}"


def plan(found: Results, /, *, guess: bool = False) -> list[Job]:
    """All jobs that are known so far: each round of all main rows before the next, then the others row by row.

    A row's further runs are known when its learning rate is chosen; `guess`: take its own where it is not, to count.
    """
    every = rows()
    main, others = [row for row in every if row.main], [row for row in every if not row.main]
    rounds: list[Iterable[Job]] = [
        *(_training(row, check(row, FACTORS[0])) for row in main),
        *(_before(over, task.name) for over in (Q4_1, Q4_0) for task in TASKS),
        *(_checks(found, row) for row in main),
        *(_seeds(found, row, SEEDS[:1], guess) for row in main),
        *(_training(row, check(row, FACTORS[0])) for row in others),
        *(_seeds(found, row, SEEDS[1:], guess) for row in main),
        *(chain(_checks(found, row), _seeds(found, row, SEEDS[:1], guess)) for row in others),
    ]
    return list({job.makes: job for job in chain(*rounds)}.values())


def _before(over: str, task: str) -> Iterator[Job]:
    yield from _bases(over)
    yield Job("before", (before(task, over),), NEEDS[over])


def _bases(over: str) -> Iterator[Job]:
    for place, key in enumerate(NEEDS[over]):
        yield Job("base", (key,), NEEDS[over][:place])


def _training(row: Row, training: Training) -> Iterator[Job]:
    yield from _bases(row.over)
    yield Job("train", (training.key,), NEEDS[row.over])


def _checks(found: Results, row: Row) -> Iterator[Job]:
    for factor in tried(found, row):
        yield from _training(row, check(row, factor))


def _seeds(found: Results, row: Row, seeds: tuple[int, ...], guess: bool) -> Iterator[Job]:
    factor = chosen(found, row) or (FACTORS[0] if guess else None)
    if factor is None or is_hopeless(found, row):
        return
    for seed in seeds:
        for task in TASKS:
            yield from _training(row, Training(task.name, row.name, seed, factor))


def check(row: Row, factor: float) -> Training:
    return Training(CHECK_TASK.name, row.name, CHECK_SEED, factor)


def tried(found: Results, row: Row) -> tuple[float, ...]:
    """FACTORS, and the one beyond for as long as the best of them is at the edge."""
    factors = FACTORS
    while (best := _best(found, row, factors)) in BEYOND and BEYOND[best] not in factors:
        factors = (*factors, BEYOND[best])
    return factors


def chosen(found: Results, row: Row) -> float | None:
    """The factor of the lowest validation loss, of those that could be trained; None before all were tried."""
    return _best(found, row, tried(found, row))


def is_hopeless(found: Results, row: Row) -> bool:
    """Whether it could be trained at no learning rate."""
    return all("failed" in found.get(check(row, factor).key, {}) for factor in FACTORS)


def _best(found: Results, row: Row, factors: tuple[float, ...]) -> float | None:
    losses = {
        factor: found[key].get("valid_loss", math.inf)
        for factor in factors if (key := check(row, factor).key) in found
    }  # fmt: skip
    return min(losses, key=losses.__getitem__) if set(losses) == set(factors) else None
