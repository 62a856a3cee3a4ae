"""What a child process does: make a base, train over it, score what was trained. All by edgelora's own ways."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peers.padded import write_dithered
from study.child import keep
from study.jobs import Job
from study.room import Room

from converters.adapter_to_gguf import write_adapter_gguf
from converters.quantize import write_planned
from edgelora.base.model import Base, open_base
from edgelora.config import TrainConfig
from edgelora.data.conversation import read_conversations
from edgelora.device import choose_products, compute_threads, computing
from edgelora.evaluate.protocols import Alternative
from edgelora.evaluate.score import questions
from edgelora.peft.adapter import TENSORS, Adapter, read_adapter
from edgelora.peft.defaults import RANK
from edgelora.peft.inject import attach
from edgelora.peft.methods import METHODS
from edgelora.peft.soft_prompt import is_trained_prompt, read_trained_prompt
from edgelora.peft.virtual_tokens import given
from edgelora.pipeline.certificate import Output
from edgelora.pipeline.quantize import prepare
from edgelora.pipeline.residual import write_residual
from edgelora.pipeline.torch_scorer import TorchScorer
from edgelora.pipeline.untie import untie
from edgelora.progress import silent
from edgelora.training.adapter_footprint import adapter_numbers
from edgelora.training.base_footprint import Model
from edgelora.training.defaults import choose
from edgelora.training.run import Run, run_training
from learning.jobs import Training
from learning.rows import BATCH_ROWS, ORIGINAL, Q4_0, Q4_1, STEPS, TEST_ROWS, UNTIED, VALID_ROWS, WARMUP, Row, named

TOGETHER = 8  # rows that are scored at once
MICRO_BATCH_TOKENS = 512


def do(job: Job, room: Room) -> None:
    """The job, each of its results kept at once."""
    work: Mapping[str, Callable[[str, Room], dict[str, Any]]] = {"base": make_base, "before": untrained, "train": fit}
    for key in job.makes:
        keep(room, key, partial(work[job.kind], key, room))


def path_of(over: str, room: Room) -> Path:
    """The file that a row trains over."""
    return room.source if over == Q4_1 else room.folder / f"{over}.gguf"


def make_base(key: str, room: Room) -> dict[str, Any]:
    """The 16-bit original (the source off its grid, which would flatter types of the same), or it as Q4_0, whole or
    without its principal part; or the source with a head of its own."""
    over = key.split("/")[1]
    out, original = path_of(over, room), path_of(ORIGINAL, room)
    draft = out.with_suffix(".draft")
    if over == ORIGINAL:
        write_dithered(room.source, draft, None)
        draft.rename(out)
    elif over == Q4_0:
        asked = prepare(original, "Q4_0")
        write_planned(asked.source, draft, asked.plan, None, silent, asked.keys)
        draft.rename(out)
    elif over == UNTIED:
        untie(room.source, out, overwrite=True)
    else:
        write_residual(original, Output(out, overwrite=True), "Q4_0", RANK)
    return {"bytes": out.stat().st_size}


def untrained(key: str, room: Room) -> dict[str, Any]:
    _, task, over = key.split("/")
    return score(open_base(path_of(over, room)), None, room.rows(task, "test"), TEST_ROWS)


def config_of(row: Row, training: Training, room: Room, out: Path) -> TrainConfig:
    """The learning rate: the method's own times the training's factor. Rank and α: the method's own, as None."""
    base = path_of(row.over, room)
    config = TrainConfig(
        base=base, data=room.rows(training.task, "train"), out=out, method=row.method, rank=row.rank,
        seed=training.seed, max_steps=STEPS, epochs=100, batch_rows=BATCH_ROWS, warmup_steps=WARMUP, device="cpu",
        base_dtype="f32" if METHODS[row.method].dense else "blocks", recompute="off", overwrite=True,
        micro_batch_tokens=MICRO_BATCH_TOKENS, train_tokens=row.train_tokens,
        original=path_of(ORIGINAL, room) if METHODS[row.method].from_original is not None else None,
    )  # fmt: skip
    settled, _ = choose(config, Model.of(open_base(base)).n_weights)
    assert settled.learning_rate is not None
    rate = float(f"{settled.learning_rate * training.factor:.3g}")
    return config.model_copy(update={"learning_rate": rate})


def fit(key: str, room: Room) -> dict[str, Any]:
    """Train, score the rows held out, and drop what was trained."""
    training = Training.read(key)
    row = named(training.row)
    base = open_base(path_of(row.over, room))
    folder = room.file(key)
    shutil.rmtree(folder, ignore_errors=True)  # of a child that was killed
    folder.mkdir()
    try:
        config = config_of(row, training, room, folder / "adapter")
        run = run_training(config)
        result = score(base, run.out, room.rows(training.task, "test"), TEST_ROWS)
        if training.is_check:
            result["valid_loss"] = score(base, run.out, room.rows(training.task, "valid"), VALID_ROWS)["loss"]
        return {**result, **facts(run, config, base), **artefact(base, run.out, config.method)}
    finally:
        shutil.rmtree(folder)


def facts(run: Run, asked: TrainConfig, base: Base) -> dict[str, Any]:
    """Of the run: losses of the steps, each before it learned from its rows, and what it took."""
    config, _ = choose(asked, Model.of(base).n_weights)
    return {
        "losses": [round(loss, 5) for loss in run.losses], "skipped": run.skipped_steps, "alpha": config.alpha,
        "rank": config.rank if METHODS[config.method].ranked else None, "learning_rate": config.learning_rate,
        "peak_bytes": run.peak_bytes, "trained": adapter_numbers(Model.of(base), config),
        "dtype": run.choices["dtype"].value, "held": config.base_dtype,
    }  # fmt: skip


def artefact(base: Base, folder: Path, method: str) -> dict[str, Any]:
    """The size of the GGUF that it leaves as, where it leaves as one over its base; else of what is kept of it."""
    if "adapter" in METHODS[method].exits:
        written = folder.with_suffix(".gguf")
        write_adapter_gguf(written, trained(folder, base), base, "adapter", "F16")
        return {"artefact": "GGUF", "artefact_bytes": written.stat().st_size}
    return {"artefact": "tensors", "artefact_bytes": (folder / TENSORS).stat().st_size}


def trained(folder: Path, base: Base) -> Adapter:
    """Of any kind, an aLoRA too."""
    return read_adapter(folder, base.layers, may_wait=True)


def score(base: Base, folder: Path | None, rows: Path, count: int) -> dict[str, Any]:
    """−log p (nats) of each row's reference, in torch over float32 products: some methods run nowhere else."""
    scorer = TorchScorer(base)
    if folder is not None and is_trained_prompt(folder):
        scorer.decoder.before = given(read_trained_prompt(folder, base.config))
    elif folder is not None:
        attach(scorer.decoder, trained(folder, base))
    asked = questions(read_conversations(rows)[:count], base.tokenizer, base.template)
    every = [Alternative((*q.prompt, *q.reference), len(q.prompt)) for q in asked]
    with computing(choose_products(), compute_threads()):
        found = [log_p for first in range(0, len(every), TOGETHER) for log_p in scorer.log_p(every[first:][:TOGETHER])]
    return figures([(-float(log_p.sum()), len(log_p)) for log_p in found])


def figures(rows: Sequence[tuple[float, int]]) -> dict[str, Any]:
    nll, tokens = zip(*rows, strict=True)
    return {"loss": sum(nll) / sum(tokens), "nll": [round(value, 5) for value in nll], "tokens": tokens}
