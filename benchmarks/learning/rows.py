"""What is compared, as tables: the rows (a method over a base), the tasks, the seeds and the learning rates tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from edgelora.config import Method

# Over what: the Q4_1 file, as blocks or, for a method that changes weights, held as float32; or a file that was
# quantized to Q4_0 from a 16-bit original (see `work.make_base`), whole or without the principal part. UNTIED is the
# Q4_1 file with a head of its own.
Q4_1, ORIGINAL, Q4_0, REST, UNTIED = "Q4_1", "original", "Q4_0", "rest", "untied"
OF_SOURCE = (Q4_1, UNTIED)  # the same model, number by number


@dataclass(frozen=True)
class Row:
    """`rank` None: the method's own. `main`: with every seed. `train_tokens`: those that token rows are trained of."""

    name: str
    method: Method
    over: str = Q4_1
    rank: int | None = None
    main: bool = False
    train_tokens: tuple[str, ...] = ()


WIDE = 64  # at the usual rank rsLoRA with its own α is LoRA, number by number
MAIN = (
    Row("lora", "lora", main=True),
    Row("loraplus", "loraplus", main=True),
    Row("dora", "dora", main=True),
    Row("pissa", "pissa", main=True),
    Row("qlora", "lora", over=Q4_0, main=True),
    Row("qpissa", "loftq", over=REST, main=True),
    Row(f"lora, rank {WIDE}", "lora", rank=WIDE, main=True),
    Row(f"rslora, rank {WIDE}", "rslora", rank=WIDE, main=True),
)
REFERENCE = "lora"
LOFTQ = Row("loftq", "loftq", over=Q4_0)  # its start needs an original, which the Q4_1 file has not
# no new ones, those that say who speaks
MARKS = Row("token_rows", "token_rows", over=UNTIED, train_tokens=("<|im_start|>", "<|im_end|>"))


def rows() -> tuple[Row, ...]:
    """All of them: whatever METHODS holds is here, the main ones first."""
    covered = {row.method for row in (*MAIN, MARKS, LOFTQ)}
    others = (Row(method, method) for method in get_args(Method) if method not in covered)
    return (*MAIN, *others, MARKS, LOFTQ)


def named(name: str) -> Row:
    return next(row for row in rows() if row.name == name)


@dataclass(frozen=True)
class Task:
    """A data set of the shared bundle. `title`: what the answers are."""

    name: str
    title: str


TASKS = (Task("extract", "booking slots as JSON"), Task("intent", "one of 12 labels"))
STEPS, BATCH_ROWS, WARMUP = 40, 4, 4  # 160 rows, of which none is seen twice
TEST_ROWS, VALID_ROWS = 60, 40
SEEDS = (0, 1, 2)

# Times the method's own learning rate. Tried on one task with one seed, by the loss on its validation rows; a best one
# at the edge is no optimum: then the one beyond is tried too, and beyond that, to these ends.
FACTORS = (1.0, 3.0, 1 / 3)
BEYOND = {3.0: 9.0, 9.0: 27.0, 27.0: 81.0, 1 / 3: 1 / 9, 1 / 9: 1 / 27, 1 / 27: 1 / 81}
CHECK_TASK, CHECK_SEED = TASKS[0], SEEDS[0]
