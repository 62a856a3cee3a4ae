"""One cell of a report: a file, with or without a live adapter, on a task. Runs in a child for true memory figures."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from edgelora.base.model import Base, open_base
from edgelora.child import run_in_child
from edgelora.data.conversation import read_conversations
from edgelora.device import peak_memory_bytes
from edgelora.evaluate.protocols import Speed
from edgelora.evaluate.report import Row
from edgelora.evaluate.score import answer_room, questions, score
from edgelora.files.adapter_check import contract_of
from edgelora.files.gguf import GGUFFile
from edgelora.progress import OnProgress, silent

SIDE_BY_SIDE = 8  # questions in one decode


@dataclass(frozen=True)
class Cell:
    """What to measure: a GGUF model, an adapter over it (or none) and the rows to answer."""

    name: str
    model: Path
    data: Path
    adapter: Path | None = None
    scale: float = 1.0
    allow_unverified: bool = False


def evaluate(cell: Cell, on_progress: OnProgress = silent) -> Row:
    """Answer and score every row of `cell.data`, and measure speed and memory."""
    return run_in_child(_evaluate, cell, on_progress=on_progress)


def context_for(base: Base, tokens: int) -> int:
    """The context to open for rows of `tokens`: a round number, and no more than the model was trained on."""
    return max(tokens, min(-(-tokens // 256) * 256, base.context))


def _evaluate(cell: Cell, on_progress: OnProgress) -> Row:
    from runtime.scorer import ScoringEngine

    base = open_base(cell.model)
    if cell.adapter is not None:
        base = base.as_trained(contract_of(GGUFFile(cell.adapter)))
    rows = read_conversations(cell.data)
    asked = questions(rows, base.tokenizer, base.template)
    room = max(len(q.prompt) for q in asked) + answer_room(asked)
    start = time.perf_counter()
    with ScoringEngine(base, n_ctx=context_for(base, room), n_sequences=SIDE_BY_SIDE) as engine:
        if cell.adapter is not None:
            engine.load("adapter", cell.adapter, allow_unverified=cell.allow_unverified)
            engine.use({"adapter": cell.scale})
        loaded = time.perf_counter() - start
        scored = score(engine, rows, asked, base.tokenizer, on_progress)
        prompt, single = engine.speed()
    size = cell.model.stat().st_size + (cell.adapter.stat().st_size if cell.adapter else 0)
    return Row(cell.name, size, scored, Speed(prompt, single, loaded, peak_memory_bytes()))
