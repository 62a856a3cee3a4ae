"""What a base, adapters over it and their composition score on tasks: all in llama.cpp, over the same rows."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from converters.adapter_to_gguf import write_adapter_gguf
from converters.compose import Part
from edgelora.base.model import Base
from edgelora.child import run_in_child
from edgelora.data.conversation import read_conversations
from edgelora.errors import ConfigError
from edgelora.pipeline.evaluate import Cell, score_task
from edgelora.progress import OnProgress

BASE = "base"


class Task(NamedTuple):
    """Rows held out, and what they are called."""

    name: str
    data: Path


@dataclass(frozen=True)
class TaskScore:
    """One model on one task. loss: mean −log p of an answer token, nats; right: the share of answers by `metric`."""

    task: str
    model: str
    n_rows: int
    loss: float
    right: float
    metric: str


def require_scorable(base: Base, tasks: Sequence[Task]) -> None:
    """Raise what scoring would, before anything else is done: BaseModelError for a checkpoint, DataError for rows."""
    assert base.file  # raises for a checkpoint
    if len({task.name for task in tasks}) < len(tasks):
        raise ConfigError("--data: two tasks have one name", "their scores could not be told apart", "pass NAME=FILE")
    for task in tasks:
        read_conversations(task.data)


def task_scores(base: Base, parts: Sequence[Part], tasks: Sequence[Task], on_progress: OnProgress) -> list[TaskScore]:
    """Every task by the base alone and with each of `parts` at the weight 1: an adapter by itself, or composed."""
    with tempfile.TemporaryDirectory(prefix="edgelora-") as room:
        # without a template of its own it answers only as an adapter's contract says
        files: dict[str, Path | None] = {BASE: None} if base.own_template is not None else {}
        for number, part in enumerate(parts):
            files[part.name] = Path(room) / f"{number}.gguf"
            write_adapter_gguf(Path(room) / f"{number}.gguf", part.adapter, base, part.name)
        return [_score(task, name, base, file, on_progress) for task in tasks for name, file in files.items()]


def _score(task: Task, name: str, base: Base, adapter: Path | None, on_progress: OnProgress) -> TaskScore:
    cell = Cell(name, base.file.path, task.data, adapter, allow_unverified=True, metric="auto")
    found = run_in_child(score_task, cell, on_progress=on_progress)
    right = sum(row.right for row in found.rows) / len(found.rows)
    return TaskScore(task.name, name, found.all.n_rows, found.all.loss, right, found.metric)
