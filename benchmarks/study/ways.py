"""What is compared, as tables: the ways, the levels, the tasks, the seeds and the learning rates that are tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from edgelora.config import Method, TrainConfig

OWN, LOFTQ = "own", "loftq"  # trained over the very quantized base; the same, begun with LoftQ's start
MERGED, IMATRIX, LIVE = "merged", "imatrix", "live"
F16, NF4 = "F16", "NF4"


@dataclass(frozen=True)
class Way:
    """`over`: what it is trained over (F16, NF4, OWN, LOFTQ). `served`: merged into F16 and quantized (with the task's
    importance matrix), or live over the quantized base."""

    number: int
    over: str
    served: str
    title: str


WAYS = (
    Way(1, F16, MERGED, "trained over F16, merged, quantized"),
    Way(2, F16, LIVE, "trained over F16, live over the quantized base"),
    Way(3, NF4, LIVE, "trained over NF4, live over the quantized base"),
    Way(4, OWN, LIVE, "trained over the very quantized base, live"),
    Way(5, OWN, MERGED, "trained over the quantized base, merged into F16, quantized"),
    Way(6, F16, IMATRIX, "trained over F16, merged, quantized with the task's importance matrix"),
    Way(7, LOFTQ, LIVE, "trained over the very quantized base from LoftQ's start, live"),
)
BEFORE = Way(0, F16, LIVE, "trained over F16, live over F16: nothing quantized")


@dataclass(frozen=True)
class Task:
    """A data set of the shared bundle: steps of training, and how many of its test rows are scored."""

    name: str
    steps: int
    rows: int
    metric: str
    title: str


TASKS = (
    Task("extract", 28, 60, "json", "booking slots as JSON, right if equal"),
    Task("intent", 20, 80, "label", "one of 12 labels"),
    Task("sql", 20, 40, "exact", "a query, right if written alike"),
)
BATCH_ROWS, WARMUP, RANK = 8, 4, 16
SEEDS = (0, 1, 2)

# Learning rates are tried on one task and seed at a level of each group, by the loss on its validation rows.
# A best one at the edge is no optimum: one beyond it is tried too.
RATES = (5e-4, 1.5e-3, 4.5e-3)
BEYOND = {RATES[0]: (1.5e-4,), RATES[-1]: (1.35e-2,)}
CHECKED_AT = {"Q2_K": "Q3_K_M", "Q3_K_M": "Q3_K_M", "Q4_K_M": "Q4_K_M", "Q5_K_M": "Q4_K_M", "Q8_0": "Q4_K_M"}
QUANTS = tuple(CHECKED_AT)
CHECK_TASK, CHECK_SEED = TASKS[0], SEEDS[0]
IMATRIX_WINDOWS = 16  # of 512 tokens


def ways() -> tuple[Way, ...]:
    """Those that this version of edgelora can train."""
    has_loftq = LOFTQ in get_args(Method) and "original" in TrainConfig.model_fields
    return tuple(way for way in WAYS if has_loftq or way.over != LOFTQ)
