"""What the results say: figures of each way at each level, and paired differences with their intervals.

A difference has two sources of chance, the rows that were held out and the seed of a training. Within a task the rows
are the same for every seed, so both are taken together: the variance of a task's difference is the rows' (paired
bootstrap of means over seeds, edgelora/evaluate/paired.py) and the seeds' (pooled over tasks, divided by their number),
with Student's t by Welch's and Satterthwaite's degrees of freedom. What rows and seeds do together is counted twice, so
intervals are rather too wide. They hold for these tasks, not for others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgelora.evaluate.paired import of_means
from study.jobs import Cell, Results
from study.ways import TASKS

NORMAL = 1.96
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # by degrees of freedom; more: the last
LOSS, RIGHT = "loss", "right"

Runs = dict[str, dict[int, Mapping[str, Any]]]
"""By task and seed: the result of a cell."""


@dataclass(frozen=True)
class Figure:
    """b − a, mean over tasks, in nats a token or as a share; `runs`: pairs (task, seed) behind it. `of_seeds`: whether
    the interval holds the seeds' chance too, or the rows' alone, as with one seed."""

    value: float
    interval_95: tuple[float, float]
    runs: int
    of_seeds: bool

    @property
    def is_clear(self) -> bool:
        low, high = self.interval_95
        return not low <= 0 <= high


def cells(found: Results) -> dict[tuple[int, str], Runs]:
    """Test results by way and level. Of a cell that was done at two learning rates, the later: the chosen one."""
    by: dict[tuple[int, str], Runs] = defaultdict(lambda: defaultdict(dict))
    for key, result in found.items():
        if key.startswith("test/") and "failed" not in result:
            cell = Cell.read(key)
            by[cell.way, cell.quant][cell.task][cell.seed] = result
    return by


def mean(runs: Runs, what: str) -> float:
    """Over tasks, of means over seeds."""
    return float(np.mean([np.mean([_value(run, what) for run in seeds.values()]) for seeds in runs.values()]))


def _value(run: Mapping[str, Any], what: str) -> float:
    return float(run["loss"]) if what == LOSS else float(np.mean(run["right"]))


def difference(a: Runs, b: Runs, what: str) -> Figure | None:
    """Of what both were done on; None if that is nothing."""
    tasks, spread, free, runs = [], [], 0, 0
    for name in (task.name for task in TASKS):
        seeds = sorted(a.get(name, {}).keys() & b.get(name, {}).keys())
        if not seeds:
            continue
        rows = {side: _rows([of[name][seed] for seed in seeds], what) for side, of in (("a", a), ("b", b))}
        weights = a[name][seeds[0]]["tokens"] if what == LOSS else None
        found = of_means(rows["a"], rows["b"], weights)
        low, high = found.interval_95
        tasks.append((found.value, ((high - low) / (2 * NORMAL)) ** 2, len(seeds), len(rows["a"])))
        apart = [_value(b[name][seed], what) - _value(a[name][seed], what) for seed in seeds]
        spread.append(float(np.var(apart) * len(apart)))
        free += len(seeds) - 1
        runs += len(seeds)
    if not tasks:
        return None
    count = len(tasks)
    of_seeds = sum(spread) / free * sum(1 / n for _, _, n, _ in tasks) / count**2 if free else 0.0
    of_rows = sum(variance for _, variance, _, _ in tasks) / count**2
    value = float(np.mean([value for value, *_ in tasks]))
    half = (of_seeds + of_rows) ** 0.5 * _quantile(of_seeds, free, of_rows, min(n for *_, n in tasks) - 1)
    return Figure(value, (value - half, value + half), runs, free > 0)


def _rows(runs: Sequence[Mapping[str, Any]], what: str) -> list[float]:
    """Each row's mean over seeds."""
    key = "nll" if what == LOSS else "right"
    return [float(value) for value in np.mean([run[key] for run in runs], axis=0)]


def _quantile(a: float, free_a: int, b: float, free_b: int) -> float:
    """Student's 97.5 % for the sum of two variances (Satterthwaite 1946)."""
    if not free_a or not a:
        return NORMAL
    degrees = (a + b) ** 2 / (a**2 / free_a + b**2 / max(free_b, 1))
    return T_975[min(int(degrees), len(T_975)) - 1]
