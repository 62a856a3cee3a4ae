"""Results → what the page is written from: for each level the figures of each way, and the differences asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from edgelora.device import processor_name
from study.jobs import Results, base, check, chosen_rate, rates_tried
from study.pool import State
from study.reading import LOSS, RIGHT, Figure, Runs, cells, difference, mean
from study.ways import (
    BATCH_ROWS,
    BEFORE,
    CHECK_TASK,
    CHECKED_AT,
    F16,
    IMATRIX_WINDOWS,
    QUANTS,
    RANK,
    SEEDS,
    TASKS,
    WAYS,
    Way,
)  # fmt: skip

USUAL = 1  # the way that the others are compared with
BROKEN = 4.0  # times the median of a way's seeds on a task: a training that broke down
QUESTIONS = (
    ("live over the quantized base rather than merged", 2, 1),
    ("merged with the task's importance matrix rather than without", 6, 1),
    ("trained over the very file, live, rather than over F16 and merged", 4, 1),
    ("the same rather than over F16 and live", 4, 2),
    ("the same rather than over NF4 and live", 4, 3),
    ("trained over NF4 rather than over F16, both live", 3, 2),
    ("trained over the very file and merged into F16 rather than kept live", 5, 4),
    ("LoftQ's start rather than LoRA's", 7, 4),
)
"""(what, b, a): how b differs from a."""


def summary(found: Results, ways: Sequence[Way], state: State) -> dict[str, Any]:
    """All that the page says, ready for JSON."""
    by = cells(found)
    measured = {}
    for quant in QUANTS:
        of_ways = complete({way.number: by.get((way.number, quant), {}) for way in ways})
        if of_ways[USUAL]:
            measured[quant] = level(of_ways, found[base(quant)]["bytes"])
    return {
        "done": state.done, "total": state.total, "failed": state.failed, "processor": processor_name(),
        "cpu_seconds": round(state.cpu_seconds), "seeds": SEEDS, "rank": RANK,
        "batch_rows": BATCH_ROWS, "tasks": [asdict(task) for task in TASKS],
        "ways": {way.number: way.title for way in WAYS}, "rates": rates(found, ways),
        "check": {"task": CHECK_TASK.name, "imatrix_tokens": 512 * IMATRIX_WINDOWS},
        "before": figures(by.get((BEFORE.number, F16), {})), "levels": measured,
    }  # fmt: skip


def complete(of_ways: Mapping[int, Runs]) -> dict[int, Runs]:
    """Only what was done by every way: means over other tasks or seeds would compare those, not ways."""
    shared = set.intersection(*({(t, s) for t, seeds in runs.items() for s in seeds} for runs in of_ways.values()))
    tasks = sorted({task for task, _ in shared})
    return {
        number: {task: {s: run for s, run in runs[task].items() if (task, s) in shared} for task in tasks}
        for number, runs in of_ways.items()
    }  # fmt: skip


def level(of_ways: Mapping[int, Runs], size_bytes: int) -> dict[str, Any]:
    best = min(of_ways, key=lambda number: mean(of_ways[number], LOSS))
    against_best = {number: difference(of_ways[best], runs, LOSS) for number, runs in of_ways.items() if number != best}
    return {
        "bytes": size_bytes,
        "runs": [[task, seed] for task, seeds in of_ways[USUAL].items() for seed in seeds],
        "ways": {
            number: {
                **figures(runs),
                "loss_against_usual": told(difference(of_ways[USUAL], runs, LOSS)),
                "right_against_usual": told(difference(of_ways[USUAL], runs, RIGHT)),
                "loss_by_task": {task: mean({task: seeds}, LOSS) for task, seeds in runs.items()},
                "right_by_task": {task: mean({task: seeds}, RIGHT) for task, seeds in runs.items()},
            }
            for number, runs in of_ways.items()
        },
        "broken": broken(of_ways),
        "best": best,
        "as_good": [number for number, found in against_best.items() if found is not None and not found.is_clear],
        "questions": [
            {"what": what, "b": b, "a": a, "loss": told(difference(of_ways[a], of_ways[b], LOSS))}
            for what, b, a in QUESTIONS
            if {a, b} <= of_ways.keys()
        ],
    }


def broken(of_ways: Mapping[int, Runs]) -> list[dict[str, Any]]:
    """Runs whose loss is nothing like those of the same way on the same task with other seeds."""
    found = []
    for number, runs in of_ways.items():
        for task, seeds in runs.items():
            usual = median(float(run["loss"]) for run in seeds.values())
            found += [
                {"way": number, "task": task, "seed": seed, "loss": run["loss"], "median": usual}
                for seed, run in seeds.items()
                if run["loss"] > BROKEN * usual
            ]
    return found


def figures(runs: Runs) -> dict[str, float]:
    return {} if not runs else {"loss": mean(runs, LOSS), "right": mean(runs, RIGHT)}


def told(figure: Figure | None) -> dict[str, Any] | None:
    return None if figure is None else {**asdict(figure), "is_clear": figure.is_clear}


def rates(found: Results, ways: Sequence[Way]) -> list[dict[str, Any]]:
    """Each way's validation loss by learning rate, at the level of each group; null where training broke down."""

    def losses(way: Way, at: str) -> dict[str, float | None]:
        tried = rates_tried(found, way, at)
        return {f"{rate:g}": found.get(check(way, at, rate).key, {}).get("loss") for rate in sorted(tried)}

    return [
        {"way": way.number, "at": at, "chosen": chosen_rate(found, way, at), "losses": losses(way, at)}
        for at in dict.fromkeys(CHECKED_AT.values())
        for way in ways
    ]
