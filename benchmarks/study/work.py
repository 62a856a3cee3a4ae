"""What a child process does: make a base, train, compute importance, score. All by edgelora's own ways."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peers.padded import WIDTH, write_dithered

from converters.adapter_to_gguf import write_adapter_gguf
from converters.quantize import write_planned
from edgelora.base.model import open_base
from edgelora.config import TrainConfig
from edgelora.data.calibration import Mix
from edgelora.data.conversation import Conversation, read_conversations
from edgelora.evaluate.metrics import choose_metric
from edgelora.evaluate.protocols import Alternative, Question
from edgelora.evaluate.score import questions, score
from edgelora.peft.adapter import read_adapter
from edgelora.pipeline.evaluate import SIDE_BY_SIDE, context_for
from edgelora.pipeline.imatrix import Settings, compute_importance
from edgelora.pipeline.merge import MergeOptions, Wanted, open_parts, write_gguf
from edgelora.pipeline.quantize import prepare
from edgelora.progress import silent
from edgelora.training.run import run_training
from runtime.scorer import ScoringEngine
from study.child import keep
from study.jobs import Cell, Job, importance, trained
from study.room import Room
from study.ways import (
    BATCH_ROWS,
    BEFORE,
    F16,
    IMATRIX,
    IMATRIX_WINDOWS,
    LIVE,
    LOFTQ,
    NF4,
    RANK,
    TASKS,
    WARMUP,
    WAYS,
    Way,
)  # fmt: skip

SPARE_TOKENS = 16
BY_NUMBER = {way.number: way for way in (BEFORE, *WAYS)}
BY_NAME = {task.name: task for task in TASKS}


def do(job: Job, room: Room) -> None:
    """The job, each of its results kept at once. What cannot be trained or built is kept as failed, with its reason."""
    if job.kind == "score":
        score_cells([Cell.read(key) for key in job.makes], room)
        return
    work: Mapping[str, Callable[[str, Room], dict[str, Any]]] = {"base": make_base, "train": fit, "imatrix": watch}
    for key in job.makes:
        keep(room, key, partial(work[job.kind], key, room))


def make_base(key: str, room: Room) -> dict[str, Any]:
    """The padded F16, or its quantization. Not held to its certificate: of 2 bits, llama.cpp's products over weights
    so coarse are farther from torch's than the limit allows, and they are what is studied."""
    quant = key.split("/")[1]
    out = room.base(quant)
    draft = out.with_suffix(".draft")
    if quant == F16:
        write_dithered(room.source, draft, WIDTH)
    else:
        asked = prepare(room.base(F16), quant)
        write_planned(asked.source, draft, asked.plan, None, silent, asked.keys)
    draft.rename(out)
    return {"bytes": out.stat().st_size}


def fit(key: str, room: Room) -> dict[str, Any]:
    """An adapter. Every base is held in bfloat16, whose products are what is computed anyway; NF4 as itself."""
    _, task, over, seed, rate = key.split("/")
    quant = over.removeprefix(f"{LOFTQ}-")
    start = {"method": LOFTQ, "original": room.base(F16)} if over != quant else {}
    out = room.file(key)
    config = TrainConfig(
        base=room.base(F16 if over == NF4 else quant), data=room.rows(task, "train"), out=out, seed=int(seed),
        learning_rate=float(rate), rank=RANK, max_steps=BY_NAME[task].steps, epochs=100, batch_rows=BATCH_ROWS,
        warmup_steps=WARMUP, base_dtype="nf4" if over == NF4 else "bf16", micro_batch_tokens=1024, overwrite=True,
        **start,
    )  # fmt: skip
    run_folder = out.with_name(f"{out.name}.run")
    shutil.rmtree(run_folder, ignore_errors=True)  # of a run that was killed
    run = run_training(config)
    shutil.rmtree(run_folder)
    return {"first_loss": run.losses[0], "last_loss": run.losses[-1], "tokens_per_s": run.tokens_per_s}


def watch(key: str, room: Room) -> dict[str, Any]:
    """The importance matrix of the task's training rows, the F16 adapter on."""
    _, task, seed, rate = key.split("/")
    adapter = room.file(f"train/{task}/{F16}/{seed}/{rate}")
    mix = Mix(room.rows(task, "train"), windows=IMATRIX_WINDOWS)
    found = compute_importance(
        room.base(F16), [(adapter, 1.0)], room.file(key), Settings(mix, engine="torch"), overwrite=True
    )
    return {"tokens": found.task_tokens}


def score_cells(cells: Sequence[Cell], room: Room) -> None:
    """Cells of one task, all live over one base or all merged."""
    base = open_base(room.base(cells[0].quant))
    task = Asked.read(cells[0], room)
    if BY_NUMBER[cells[0].way].served != LIVE:
        for cell in cells:
            keep(room, cell.key, partial(task.of_merged, cell, BY_NUMBER[cell.way], room))
        return
    with ScoringEngine(base, n_ctx=context_for(base, task.room), n_sequences=SIDE_BY_SIDE, threads=1) as engine:
        for cell in cells:
            keep(room, cell.key, partial(task.of_live, cell, BY_NUMBER[cell.way], room, engine))


@dataclass(frozen=True)
class Asked:
    """The held-out rows of a cell, tokenized. `answers`: whether they are answered too, not their loss alone."""

    rows: list[Conversation]
    questions: list[Question]
    metric: str
    answers: bool

    @classmethod
    def read(cls, cell: Cell, room: Room) -> Asked:
        base, task = open_base(room.base(cell.quant)), BY_NAME[cell.task]
        rows = read_conversations(room.rows(cell.task, cell.rows))[: task.rows]
        return cls(rows, questions(rows, base.tokenizer, base.template), task.metric, cell.rows == "test")

    @property
    def room(self) -> int:
        longest = max(len(question.reference) for question in self.questions)
        return max(len(question.prompt) for question in self.questions) + longest + SPARE_TOKENS

    def of_live(self, cell: Cell, way: Way, room: Room, engine: ScoringEngine) -> dict[str, Any]:
        base = open_base(room.base(cell.quant))
        with tempfile.TemporaryDirectory(dir=room.folder) as folder:
            written, key = Path(folder) / "adapter.gguf", trained(cell, way)
            write_adapter_gguf(written, read_adapter(room.file(key), base.layers), base, key, "F32")
            engine.load_own("adapter", written)
            engine.use({"adapter": 1.0})
            found = self.measured(engine)
        engine.unload("adapter")
        return found

    def of_merged(self, cell: Cell, way: Way, room: Room) -> dict[str, Any]:
        """Merged and quantized in one pass, scored, and deleted."""
        matrix = room.file(importance(cell)) if way.served == IMATRIX else None
        base, parts = open_parts(room.base(F16), [(room.file(trained(cell, way)), 1.0)], allow_unverified=False)
        with tempfile.TemporaryDirectory(dir=room.folder) as folder:
            written = Path(folder) / "merged.gguf"
            write_gguf(written, base, parts, Wanted.read(cell.quant, MergeOptions(imatrix=matrix)))
            merged = open_base(written)
            size = context_for(merged, self.room)
            with ScoringEngine(merged, n_ctx=size, n_sequences=SIDE_BY_SIDE, threads=1) as engine:
                return self.measured(engine)

    def measured(self, engine: ScoringEngine) -> dict[str, Any]:
        """−log p (nats) of each row's reference, and which answers are right."""
        if not self.answers:
            asked = [Alternative((*q.prompt, *q.reference), len(q.prompt)) for q in self.questions]
            return _figures([(-float(log_p.sum()), len(log_p)) for log_p in engine.log_p(asked)])
        metric = choose_metric([row.answer for row in self.rows], self.metric)
        rows = score(engine, self.rows, self.questions, engine.base.tokenizer, metric=metric).rows
        return {**_figures([(row.nll_nats, row.n_tokens) for row in rows]), "right": [int(row.right) for row in rows]}


def _figures(rows: Sequence[tuple[float, int]]) -> dict[str, Any]:
    nll, tokens = zip(*rows, strict=True)
    return {"loss": sum(nll) / sum(tokens), "nll": [round(value, 5) for value in nll], "tokens": tokens}
