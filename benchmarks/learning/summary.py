"""Results → what the page is written from: of each row its figures, and of each claim what is to be said of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from study.jobs import Results
from study.pool import State
from study.reading import LOSS, Figure, Runs, difference

from edgelora.device import processor_name
from learning.claims import CLAIMS, MARGIN, WINDOW, read
from learning.jobs import Training, before, check, chosen, tried
from learning.rows import (
    BATCH_ROWS,
    CHECK_TASK,
    FACTORS,
    OF_SOURCE,
    Q4_0,
    Q4_1,
    REFERENCE,
    SEEDS,
    STEPS,
    TASKS,
    TEST_ROWS,
    VALID_ROWS,
    WARMUP,
    Row,
    rows,
)  # fmt: skip

USUAL = dict.fromkeys(OF_SOURCE, REFERENCE)  # over Q4_0, whole or not: qlora
FACTS = ("rank", "alpha", "learning_rate", "peak_bytes", "trained", "artefact", "artefact_bytes", "held")


def summary(found: Results, state: State) -> dict[str, Any]:
    """All that the page says, ready for JSON."""
    of_rows = {row.name: runs_of(found, row) for row in rows()}
    return {
        "done": state.done, "total": state.total, "failed": failures(found), "processor": processor_name(),
        "cpu_seconds": round(state.cpu_seconds), "seeds": SEEDS, "steps": STEPS, "batch_rows": BATCH_ROWS,
        "test_rows": TEST_ROWS, "valid_rows": VALID_ROWS, "check_task": CHECK_TASK.name, "margin": MARGIN,
        "window": WINDOW, "warmup": WARMUP, "tasks": [asdict(task) for task in TASKS],
        "before": {
            over: {task.name: found.get(before(task.name, over), {}).get("loss") for task in TASKS}
            for over in (Q4_1, Q4_0)
        },
        "rows": [told(found, row, of_rows) for row in rows() if of_rows[row.name]],
        "missing": [row.name for row in rows() if not of_rows[row.name]],
        "rates": [rates(found, row) for row in rows() if check(row, FACTORS[0]).key in found],
        "claims": [read(claim, of_rows) for claim in CLAIMS],
    }  # fmt: skip


def failures(found: Results) -> dict[str, str]:
    """By what could not be done: why. Of a row that fails at every learning rate, once."""
    said: dict[str, str] = {}
    for key, result in found.items():
        if "failed" in result:
            name = Training.read(key).row if key.startswith("train/") else key
            said.setdefault(name, result["failed"])
    return said


def factor_of(found: Results, row: Row) -> float:
    """Of the learning rate that a row is shown with: the best of those that were tried so far."""
    losses = {
        factor: found[key]["valid_loss"]
        for factor in tried(found, row) if "valid_loss" in found.get(key := check(row, factor).key, {})
    }  # fmt: skip
    return chosen(found, row) or min(losses, key=losses.__getitem__, default=FACTORS[0])


def runs_of(found: Results, row: Row) -> Runs:
    """Its results at that learning rate, by task and seed."""
    runs: Runs = defaultdict(dict)
    factor = factor_of(found, row)
    for task in TASKS:
        for seed in SEEDS:
            result = found.get(Training(task.name, row.name, seed, factor).key, {})
            if "loss" in result:
                runs[task.name][seed] = result
    return dict(runs)


def told(found: Results, row: Row, of_rows: Mapping[str, Runs]) -> dict[str, Any]:
    own = of_rows[row.name]
    reference = USUAL.get(row.over, "qlora")
    one = next(iter(next(iter(own.values())).values()))
    timed = found.get(f"time/{row.name}", {})
    against = None if row.name == reference else difference(of_rows.get(reference, {}), own, LOSS)
    return {
        "name": row.name, "over": row.over, "factor": factor_of(found, row), **{name: one[name] for name in FACTS},
        "by_task": {task: of_seeds([run["loss"] for run in seeds.values()]) for task, seeds in own.items()},
        "against": reference, "difference": None if against is None else shown(against),
        "skipped": sum(run["skipped"] for seeds in own.values() for run in seeds.values()),
        "peak_bytes": max(run["peak_bytes"] for seeds in own.values() for run in seeds.values()),
        "step": {name: value for name, value in timed.items() if name != "failed"},
    }  # fmt: skip


def shown(figure: Figure) -> dict[str, Any]:
    return {**asdict(figure), "is_clear": figure.is_clear}


def of_seeds(losses: list[float]) -> dict[str, Any]:
    """Mean and sample deviation over seeds; None of one."""
    spread = float(np.std(losses, ddof=1)) if len(losses) > 1 else None
    return {"loss": float(np.mean(losses)), "spread": spread, "seeds": len(losses)}


def rates(found: Results, row: Row) -> dict[str, Any]:
    """The validation loss by factor of the learning rate; null where training broke down."""
    factor = chosen(found, row)
    results = {factor: found.get(check(row, factor).key) for factor in sorted(tried(found, row))}
    return {
        "row": row.name, "chosen": None if factor is None else f"{factor:.3g}",
        "losses": {f"{f:.3g}": result.get("valid_loss") for f, result in results.items() if result is not None},
        "rates": {f"{f:.3g}": result.get("learning_rate") for f, result in results.items() if result is not None},
    }  # fmt: skip
