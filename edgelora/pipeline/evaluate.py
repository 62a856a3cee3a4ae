"""What is measured of one model, with or without a live adapter: a task, multiple choice, speed. Each in a child."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from edgelora.base.model import Base, open_base
from edgelora.child import run_in_child
from edgelora.data.conversation import read_conversations
from edgelora.data.formats import parse_row
from edgelora.data.sources import read_objects
from edgelora.device import peak_memory_bytes
from edgelora.evaluate.choices import (
    Choice,
    ChoiceScore,
    alternatives,
    is_choice,
    read_choices,
    score_choices,
)
from edgelora.evaluate.metrics import choose_metric
from edgelora.evaluate.protocols import Alternative, Speed
from edgelora.evaluate.report import Row
from edgelora.evaluate.score import Scored, answer_room, questions, score
from edgelora.peft.adapter import CONFIG, TENSORS
from edgelora.pipeline.engines import LLAMA_CPP, TORCH, as_trained
from edgelora.progress import OnProgress, Pace, Progress, silent

if TYPE_CHECKING:
    from edgelora.pipeline.torch_scorer import TorchScorer
    from runtime.scorer import ScoringEngine

SIDE_BY_SIDE = 8  # questions in one decode
SPEED_CONTEXT = 512
SWITCHES = 5
ADAPTER = "adapter"


@dataclass(frozen=True)
class Cell:
    """What to measure: a model, an adapter over it (or none) and the rows to answer. `metric`: a name of METRICS or
    `auto`; `pattern` in its place: a regular expression. `engine`: as `choose_engine` says; llama.cpp reads GGUF files
    alone, torch the adapter's folder."""

    name: str
    model: Path
    data: Path
    adapter: Path | None = None
    scale: float = 1.0
    allow_unverified: bool = False
    metric: str = "exact"
    pattern: str | None = None
    engine: str = LLAMA_CPP

    @property
    def in_torch(self) -> bool:
        return self.engine == TORCH

    @property
    def size_bytes(self) -> int:
        """Of all files of the model and of its adapter."""
        files = [*open_base(self.model).source.files, *(adapter_files(self.adapter) if self.adapter else [])]
        return sum(file.stat().st_size for file in files)


@dataclass(frozen=True)
class Chosen:
    """One file on multiple choice."""

    name: str
    size_bytes: int
    score: ChoiceScore
    speed: Speed

    def as_dict(self) -> dict[str, Any]:
        shares = {custom: self.score.share(custom) for custom in self.score.right}
        n_rows = len(next(iter(self.score.right.values())))
        return {"name": self.name, "size_bytes": self.size_bytes, "rows": n_rows, "chance": self.score.chance, **shares}


def is_choice_file(path: Path) -> bool:
    """Whether rows are multiple choice, by the first of them. Raises DataError."""
    _, first = next(read_objects(path))
    if is_choice(first):
        return True
    try:
        parse_row(first)
    except ValueError:
        return is_choice(first, nearly=True)
    return False


def evaluate(cell: Cell, on_progress: OnProgress = silent) -> Row:
    """Answer and score every row of `cell.data`, and measure speed and memory."""
    scored = run_in_child(score_task, cell, with_torch=cell.in_torch, on_progress=on_progress)
    return Row(cell.name, cell.size_bytes, scored, run_in_child(measure_speed, cell, with_torch=cell.in_torch))


def choose(cell: Cell, on_progress: OnProgress = silent) -> Chosen:
    """Of every row of `cell.data` the likeliest alternative, and speed and memory."""
    found = run_in_child(score_choice, cell, with_torch=cell.in_torch, on_progress=on_progress)
    return Chosen(cell.name, cell.size_bytes, found, run_in_child(measure_speed, cell, with_torch=cell.in_torch))


def context_for(base: Base, tokens: int) -> int:
    """The context to open for rows of `tokens`: a round number, and no more than the model was trained on."""
    return max(tokens, min(-(-tokens // 256) * 256, base.context))


# -- in a child ---------------------------------------------------------------------------------------------------


def score_task(cell: Cell, on_progress: OnProgress) -> Scored:
    """Answers and scores. Raises DataError for rows that are broken or that the metric cannot score."""
    base = as_trained(cell.model, cell.adapter)
    rows = read_conversations(cell.data)
    metric = choose_metric([row.answer for row in rows], cell.metric, cell.pattern)
    asked = questions(rows, base.tokenizer, base.template)
    room = max(len(q.prompt) for q in asked) + answer_room(asked)
    with _opened(cell, base, room) as (engine, _):
        return score(engine, rows, asked, base.tokenizer, on_progress, metric)


def score_choice(cell: Cell, on_progress: OnProgress) -> ChoiceScore:
    """The likeliest alternatives. Raises DataError for a row that is broken."""
    base = as_trained(cell.model, cell.adapter)
    rows = read_choice_file(cell.data)
    room = max(len(one.ids) for row in rows for one in alternatives(row, base.tokenizer))
    pace = Pace(len(rows))

    with _opened(cell, base, room) as (engine, _):

        def log_p(some: Sequence[Alternative]) -> list[np.ndarray]:
            found = engine.log_p(some)
            speed, eta = pace.step(sum(len(one.ids) for one in some))
            on_progress(Progress("choose", pace.done, pace.total, tokens_per_s=speed, eta_s=eta))
            return found

        return score_choices(rows, base.tokenizer, log_p)


def measure_speed(cell: Cell, _: OnProgress) -> Speed:
    """How fast and how large a process is that serves one conversation of SPEED_CONTEXT tokens."""
    base = as_trained(cell.model, cell.adapter)
    with _opened(cell, base, min(SPEED_CONTEXT, base.context), side_by_side=0) as (engine, loaded):
        found = engine.rates()
        switch = None
        if cell.adapter is not None and not cell.in_torch:
            switch = _switch_seconds(cast("ScoringEngine", engine), cell.scale)
        return Speed(
            statistics.median(found.prompt), statistics.median(found.generation), loaded, peak_memory_bytes(),
            (min(found.prompt), max(found.prompt)), (min(found.generation), max(found.generation)),
            found.first_token_seconds, switch,
        )  # fmt: skip


def adapter_files(adapter: Path) -> list[Path]:
    """What decides what an adapter computes."""
    return [adapter / CONFIG, adapter / TENSORS] if adapter.is_dir() else [adapter]


def read_choice_file(path: Path) -> list[Choice]:
    """Multiple choice, row by row. Raises DataError."""
    return read_choices((row for _, row in read_objects(path)), str(path))


@contextmanager
def _opened(
    cell: Cell, base: Base, room: int, side_by_side: int = SIDE_BY_SIDE
) -> Iterator[tuple[ScoringEngine | TorchScorer, float]]:
    """The model where it runs with its adapter on, and how many seconds that took."""
    start = time.perf_counter()
    if cell.in_torch:
        from edgelora.pipeline.torch_scorer import open_scorer

        adapter = None if cell.adapter is None else (cell.adapter, cell.scale)
        yield open_scorer(base, adapter, allow_unverified=cell.allow_unverified), time.perf_counter() - start
        return
    from runtime.scorer import ScoringEngine

    with ScoringEngine(base, n_ctx=context_for(base, room), n_sequences=side_by_side) as engine:
        if cell.adapter is not None:
            engine.load(ADAPTER, cell.adapter, allow_unverified=cell.allow_unverified)
            engine.use({ADAPTER: cell.scale})
        yield engine, time.perf_counter() - start


def _switch_seconds(engine: ScoringEngine, scale: float) -> float:
    """What a switch from no adapter to this one adds to the next token: the median of SWITCHES."""

    def token() -> float:
        start = time.perf_counter()
        engine.logits([[0]], [[0]])
        return time.perf_counter() - start

    more = []
    for _ in range(SWITCHES):
        engine.use({})
        token()
        start = time.perf_counter()
        engine.use({ADAPTER: scale})
        set_in = time.perf_counter() - start
        more.append(set_in + token() - token())  # llama.cpp reserves its graph anew with the first, not the second
    return max(statistics.median(more), 0.0)
