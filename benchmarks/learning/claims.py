"""What the papers claim, and what is to be said of it here: a rule over figures and their intervals, never a feeling.

A claim that B is better than A is *confirmed here* if the whole 95 % interval of B − A lies below 0; *not confirmed* if
all of it lies above −MARGIN, so that whatever B gains is less than that; else *not decidable at this size*. Of one seed
nothing is decided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from study.reading import LOSS, T_975, Figure, Runs, difference

from learning.rows import SEEDS, TASKS

MARGIN = 0.01  # nats a token
CONFIRMED, NOT_CONFIRMED, UNDECIDABLE = "confirmed here", "not confirmed", "not decidable at this size"
OPEN = "not decidable yet"
WINDOW = 8  # steps that a loss of training is the mean of
FASTER = 1.5

Losses = Mapping[str, Mapping[int, Sequence[float]]]
"""By task and seed: the losses of the steps."""


@dataclass(frozen=True)
class Claim:
    """`b` is said to beat `a` in what `measure` measures."""

    what: str
    paper: str
    b: str
    a: str
    measure: Callable[[Runs, Runs], Figure | None]
    better: Callable[[Figure], str]
    unit: str = "nats"


def end(a: Runs, b: Runs) -> Figure | None:
    """Of the loss held out, when all is learned."""
    return difference(a, b, LOSS)


def at(step: int) -> Callable[[Runs, Runs], Figure | None]:
    """Of the loss of training around this step: of rows that were not learned from before."""

    def measure(a: Runs, b: Runs) -> Figure | None:
        return over_runs(a, b, lambda x, y: float(np.mean(y[step - WINDOW : step]) - np.mean(x[step - WINDOW : step])))

    return measure


def speed(a: Runs, b: Runs) -> Figure | None:
    """ln of how many times fewer steps b needs for the loss of training that a ends with; 0 if it never comes there."""

    def measure(x: Sequence[float], y: Sequence[float]) -> float:
        goal = float(np.mean(x[-WINDOW:]))
        there = [step for step in range(WINDOW, len(y) + 1) if np.mean(y[step - WINDOW : step]) <= goal]
        return math.log(len(x) / there[0]) if there else 0.0

    return over_runs(a, b, measure)


def over_runs(a: Runs, b: Runs, of: Callable[[Sequence[float], Sequence[float]], float]) -> Figure | None:
    """The mean over tasks of `of(a's losses, b's)` with Student's interval: the seeds' chance, pooled over tasks. Each
    seed has rows of its own, so theirs is in it."""
    values = [
        [of(a[task][seed]["losses"], b[task][seed]["losses"]) for seed in sorted(a[task].keys() & b[task].keys())]
        for task in sorted(a.keys() & b.keys())
    ]
    values = [of_task for of_task in values if of_task]
    if not values:
        return None
    free, count = sum(len(of_task) - 1 for of_task in values), sum(map(len, values))
    value = float(np.mean([np.mean(of_task) for of_task in values]))
    if not free:
        return Figure(value, (-math.inf, math.inf), count, False)
    variance = sum(float(np.var(of_task)) * len(of_task) for of_task in values) / free
    spread = (variance * sum(1 / len(of_task) for of_task in values)) ** 0.5 / len(values)
    half = T_975[min(free, len(T_975)) - 1] * spread
    return Figure(value, (value - half, value + half), count, True)


def lower(figure: Figure) -> str:
    """The rule for a loss."""
    low, high = figure.interval_95
    return CONFIRMED if high < 0 else NOT_CONFIRMED if low > -MARGIN else UNDECIDABLE


def faster(figure: Figure) -> str:
    """The rule for a speed: at least FASTER, or less for certain."""
    low, high = figure.interval_95
    goal = math.log(FASTER)
    return CONFIRMED if low >= goal else NOT_CONFIRMED if high < goal else UNDECIDABLE


DORA, LORAPLUS, PISSA, RSLORA = "arXiv:2402.09353", "arXiv:2402.12354", "arXiv:2404.02948", "arXiv:2312.03732"
CLAIMS = (
    Claim("DoRA learns better than LoRA", DORA, "dora", "lora", end, lower),
    Claim("LoRA+ learns better than LoRA", LORAPLUS, "loraplus", "lora", end, lower),
    Claim("LoRA+ is 1.5 to 2 times as fast", LORAPLUS, "loraplus", "lora", speed, faster, "times"),
    *(
        Claim(f"PiSSA is ahead of LoRA by step {step}", PISSA, "pissa", "lora", at(step), lower)
        for step in (WINDOW, 2 * WINDOW, 3 * WINDOW)
    ),
    Claim("PiSSA ends lower than LoRA", PISSA, "pissa", "lora", end, lower),
    Claim("QPiSSA learns better than QLoRA", PISSA, "qpissa", "qlora", end, lower),
    Claim(f"QPiSSA is ahead of QLoRA by step {WINDOW}", PISSA, "qpissa", "qlora", at(WINDOW), lower),
    Claim(
        "rsLoRA learns better than LoRA at rank 64", RSLORA, "rslora, rank 64", "lora, rank 64", end, lower,
    ),
)  # fmt: skip


def read(claim: Claim, of_rows: Mapping[str, Runs]) -> dict[str, Any]:
    """A claim with its figure and what is to be said; of fewer seeds than there shall be, nothing."""
    a, b = of_rows.get(claim.a, {}), of_rows.get(claim.b, {})
    figure = claim.measure(a, b)
    seeds = [len(a.get(task.name, {}).keys() & b.get(task.name, {}).keys()) for task in TASKS]
    told = None if figure is None or not figure.of_seeds else asdict(figure)
    said = claim.better(figure) if figure is not None and min(seeds) >= len(SEEDS) else OPEN
    return {
        "what": claim.what, "paper": claim.paper, "b": claim.b, "a": claim.a, "unit": claim.unit, "figure": told,
        "runs": 0 if figure is None else figure.runs, "verdict": said,
    }  # fmt: skip
