"""Measure what each tensor's bits are worth, in a child process, and keep it: nothing is measured twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from gguf.constants import GGMLQuantizationType

from edgelora.base import ggml
from edgelora.base.model import Base, open_base
from edgelora.base.tensors import Stored
from edgelora.child import run_in_child
from edgelora.device import choose_products, compute_threads, computing
from edgelora.evaluate.sensitivity import Cost, Sensitivity, as_json, as_line, from_json, from_lines
from edgelora.files.atomic import write_text
from edgelora.home import models_folder
from edgelora.pipeline.calibration import Windows
from edgelora.progress import OnProgress, Pace, Progress, silent

if TYPE_CHECKING:
    from torch import Tensor

    from edgelora.base.output_kl import OutputKL, Slot
    from edgelora.nn.decoder import Decoder

Type = GGMLQuantizationType

# Rows whose errors are compared between types: errors of rows add up, and only ratios count.
SAMPLED_ROWS = 64


@dataclass(frozen=True)
class Trial:
    """What is tried of one tensor: the type whose KL is measured, and those whose errors are."""

    probe: Type
    kinds: tuple[Type, ...]
    importance: np.ndarray | None
    """float32 (columns,), or None: all columns alike."""


@dataclass(frozen=True)
class Job:
    """Measure the tensors of `trials` (by GGUF name) of the model at `source` on `windows`."""

    source: Path
    windows: Windows
    trials: Mapping[str, Trial]
    log: Path | None = None
    """Where each tensor is noted as soon as it is measured, for a run that goes on where this one was stopped."""


def sensitivities(
    job: Job, key: str, on_cost: Callable[[Cost], None] = lambda _: None, on_progress: OnProgress = silent
) -> dict[str, Sensitivity]:
    """By GGUF tensor name, from the cache where `key` was measured before.

    `on_cost` hears what it takes before it starts, and nothing if it is there already.
    """
    cache = models_folder() / "sensitivities" / f"{key}.json"
    if cache.exists():
        return from_json(cache.read_text(encoding="utf-8"), str(cache))
    cache.parent.mkdir(parents=True, exist_ok=True)
    log = cache.with_suffix(".log")
    found = from_lines(log.read_text(encoding="utf-8")) if log.exists() else {}
    rest = {name: trial for name, trial in job.trials.items() if name not in found}
    if rest:
        left = replace(job, trials=rest, log=log)

        def hear(progress: Progress) -> None:
            if progress.step == 0:
                on_cost(Cost(progress.total, progress.eta_s or 0.0))
            else:
                on_progress(progress)

        found |= run_in_child(time_and_measure, left, with_torch=True, on_progress=hear)
    write_text(cache, as_json(found), overwrite=True)
    log.unlink(missing_ok=True)
    return found


def time_and_measure(job: Job, on_progress: OnProgress) -> dict[str, Sensitivity]:
    """`measure`, and before it, as the progress of step 0, what it will take. In one process: ggml's tables of the IQ
    types, made for the first tensor, take seconds.
    """
    cost = time_one(job)
    on_progress(Progress("sensitivity", 0, cost.evaluations, eta_s=cost.seconds))
    return measure(job, on_progress)


def time_one(job: Job) -> Cost:
    """Measure one tensor near the middle of the model, and say what all of them will take.

    It is measured twice: the first time, ggml makes its tables.
    """
    with _opened(job) as model:
        middle = model.base.config.num_hidden_layers // 2
        name = min(model.slots, key=lambda name: abs(model.slots[name].layer - middle), default=None)
        if name is None:
            return Cost(0, 0.0)
        x = next(x for layer, x in model.output.layers() if layer == model.slots[name].layer)
        model.measure(name, job.trials[name], x)
        start = time.perf_counter()
        model.measure(name, job.trials[name], x)
        seconds = time.perf_counter() - start
        return Cost(len(model.slots), seconds * sum(map(model.work, model.slots)) / model.work(name))


def measure(job: Job, on_progress: OnProgress = silent) -> dict[str, Sensitivity]:
    """Layer by layer, so that what lies before a tensor is computed once for all of its layer."""
    found: dict[str, Sensitivity] = {}
    with _opened(job) as model:
        work = Pace(sum(map(model.work, model.slots)))
        for layer, x in model.output.layers():
            for name in (name for name, slot in model.slots.items() if slot.layer == layer):
                found[name] = model.measure(name, job.trials[name], x)
                if job.log is not None:
                    with job.log.open("a", encoding="utf-8") as log:
                        log.write(as_line(name, found[name]))
                _, eta = work.step(0, model.work(name))
                on_progress(Progress("sensitivity", len(found), len(model.slots), eta_s=eta))
    return found


@dataclass(frozen=True)
class _Opened:
    """The model as it is, what it says, and where the tensors of a job are used."""

    base: Base
    decoder: Decoder
    output: OutputKL
    slots: Mapping[str, Slot]

    def work(self, name: str) -> int:
        """What measuring a tensor takes, in layers: those from it on, and the head."""
        return self.base.config.num_hidden_layers - self.slots[name].layer + 1

    def measure(self, name: str, trial: Trial, x: Tensor) -> Sensitivity:
        """x (T, d): the state that enters the first layer which the tensor changes."""
        from edgelora.base.output_kl import exchanged
        from edgelora.base.weights import from_rows

        slot = self.slots[name]
        stored = self.base.tensors.matrix(f"{slot.hf_name}.weight")
        rows = ggml.requantize(stored.rows, stored.kind, stored.columns, trial.probe, trial.importance)
        with exchanged(self.decoder, slot, from_rows(rows, trial.probe, stored.columns)):
            kl = self.output.from_layer(slot.layer, self.output.embedded() if slot.embeds else x)
        return Sensitivity(trial.probe.name, kl, errors(stored, trial))


@contextmanager
def _opened(job: Job) -> Iterator[_Opened]:
    from edgelora.base.decoder import build_decoder
    from edgelora.base.output_kl import OutputKL, slots

    base = open_base(job.source)
    with computing(choose_products(), compute_threads()):
        decoder = build_decoder(base)
        used = {name: slot for name, slot in slots(base).items() if name in job.trials}
        yield _Opened(base, decoder, OutputKL(decoder, job.windows.ids, job.windows.scored), used)


def errors(stored: Stored, trial: Trial) -> dict[str, float]:
    """By type, the weighted squared error of a few seeded rows of a tensor: Σ importance · (w − Q(w))²."""
    n_rows = len(stored.rows)
    picked = np.sort(np.random.default_rng(0).choice(n_rows, min(SAMPLED_ROWS, n_rows), replace=False))
    weights = ggml.dequantize(stored.rows[picked], stored.kind, stored.columns)
    importance = np.ones(stored.columns) if trial.importance is None else trial.importance
    found = {}
    for kind in {trial.probe, *trial.kinds}:
        blocks = ggml.quantize(weights, kind, trial.importance)
        found[kind.name] = float(
            (np.square(weights - ggml.dequantize(blocks, kind, stored.columns)) @ importance).sum()
        )
    return found
