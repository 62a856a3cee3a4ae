"""The training loop: rows → micro-batches → gradients → a step, measured and kept now and then. Knows no files."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Protocol

import numpy as np
import torch

from edgelora.data.pack import Batch
from edgelora.errors import EdgeloraError
from edgelora.peft import dropout
from edgelora.peft.inject import without_adapter
from edgelora.peft.longlora import attend_in_groups
from edgelora.progress import Pace, Progress
from edgelora.training.job import Job
from edgelora.training.measure import measure
from edgelora.training.neftune import neftune
from edgelora.training.objectives.objective import added, mean_losses, over_all
from edgelora.training.optim import clip, set_share
from edgelora.training.schedule import share_at
from edgelora.training.state import State
from edgelora.training.where import group_of

MAX_BAD_STEPS = 3
SAVE_EVERY_S = 600.0  # also in the midst of a step, whose micro-batches may take longer than this
SAVE_EVERY_STEPS = 100


class Watch(Protocol):
    """Who is told of a run while it goes on, keeps its checkpoints, and may ask it to stop.

    stepped: behind a step of `tokens`, `seconds` after the run began. peak_bytes: None where another process tells it.
    """

    def stepped(self, progress: Progress, tokens: int, seconds: float) -> None: ...

    def save(self, state: State) -> None: ...

    def asked_to_stop(self) -> bool: ...

    def peak_bytes(self) -> int | None: ...


def train(job: Job, state: State, watch: Watch) -> bool:
    """Train from where `state` is to the end; returns whether it came there (False: asked to stop, and saved).

    A step whose loss or gradient is not finite is skipped and counted; MAX_BAD_STEPS in a row end the run with an
    error, and what stood before them is kept. Deterministic on the CPU under config.seed, wherever it was stopped and
    resumed.
    """
    with job.decoder.running():
        return _train(job, state, watch)


def _train(job: Job, state: State, watch: Watch) -> bool:
    clock = _Clock(job.total, state, watch)
    if state.micro and job.world.size > 1:
        _begin_again(state)
    if state.step == 0 and state.micro == 0 and job.eval_every <= job.total:
        with clock.pace.aside(measures=True):
            _tell_of_the_base(job, state, watch, clock)
    while state.step < job.total and not _is_enough(job, state):
        batches = job.world.share(job.batches(state.step))
        for _ in _accumulate(job, state, batches):
            # what other processes have summed is not known here
            if job.world.size == 1 and clock.since_save() > SAVE_EVERY_S and state.micro < len(batches):
                clock.save()
        numbers = over_all(job.objective.shows, state.numbers, job.world.sum)
        loss, norm, rate = _update(job, state)
        tokens = int(job.world.sum([float(sum(b.n_tokens for b in batches if b is not None))])[0])
        with clock.pace.aside(measures=True) if job.is_measured(state.step) else nullcontext():
            measured = measure(job, state, state.step)
        speed, eta = clock.pace.step(tokens, measurements=job.measurements_left(state.step))
        watch.stepped(
            Progress(
                "train", state.step, job.total, loss=loss, learning_rate=rate, tokens_per_s=speed, eta_s=eta,
                peak_bytes=watch.peak_bytes(), epoch=job.order.epoch_at(state.step),
                smoothed_loss=state.smoothed.add(loss), grad_norm=norm, skipped_steps=state.skipped,
                numbers=numbers, **measured,
            ),
            tokens, clock.now(),
        )  # fmt: skip
        if state.in_a_row >= MAX_BAD_STEPS:
            clock.save()
            raise not_finite(f"in {state.in_a_row} steps in a row (step {state.step})", job.config.learning_rate)
        stop = job.world.any(watch.asked_to_stop())
        is_over = state.step == job.total or _is_enough(job, state)
        if stop or is_over or _is_due(job, state.step, clock):
            clock.save()
        if stop and not is_over:
            return False
    return True


def _tell_of_the_base(job: Job, state: State, watch: Watch, clock: _Clock) -> None:
    """Before the first step: what there is to improve on. A prompt that nothing has learned yet would be in its way."""
    with without_adapter(job.decoder):
        measured = measure(job, state, 0)
    if measured:
        watch.stepped(Progress("train", 0, job.total, epoch=0.0, **measured), 0, clock.now())


class NotFinite(EdgeloraError):
    """Nothing can be learned with these settings: the loss is no number."""


def not_finite(when: str, learning_rate: float | None) -> NotFinite:
    """The error of a run that learns nothing, with a learning rate to try."""
    return NotFinite(
        what=f"the loss or its gradient was not finite {when}",
        why="the learning rate is too high for this model, or the base holds broken weights",
        fix=f"try --learning-rate {(learning_rate or 0) / 5:g} --overwrite",
    )


class _Clock:
    """The seconds of the run, those of earlier processes included, its pace, and how long ago it was saved."""

    def __init__(self, total: int, state: State, watch: Watch) -> None:
        self._state, self._watch, self.pace = state, watch, Pace(total, state.step)
        self._before, self._start = state.seconds, time.perf_counter()
        self._saved = self._start

    def now(self) -> float:
        return self._before + time.perf_counter() - self._start

    def since_save(self) -> float:
        return time.perf_counter() - self._saved

    def save(self) -> None:
        """Have the state kept. What that takes is no part of the pace."""
        with self.pace.aside():
            self._state.seconds = self.now()
            self._watch.save(self._state)
        self._saved = time.perf_counter()


def _is_enough(job: Job, state: State) -> bool:
    """Whether the held-out loss has not fallen for as long as one was patient."""
    return job.config.patience is not None and state.stale >= job.config.patience


def _is_due(job: Job, step: int, clock: _Clock) -> bool:
    """Whether a checkpoint is: at every measurement too, so that the best one can be kept."""
    every = job.config.save_every
    if every is not None and step % every == 0:
        return True
    measured = bool(job.held_out) and step % job.eval_every == 0
    return measured or clock.since_save() > SAVE_EVERY_S or (every is None and step % SAVE_EVERY_STEPS == 0)


def _begin_again(state: State) -> None:
    """Forget the gradients of a step that one process began alone: they would count once for each of several."""
    state.optimizer.zero_grad(set_to_none=True)
    state.micro, state.partial, state.numbers = 0, 0.0, {}


def _accumulate(job: Job, state: State, batches: Sequence[Batch | None]) -> Iterator[None]:
    """Add up the gradients of the micro-batches that `state` has not seen; yields after each of them."""
    losses = mean_losses(job.objective, job.decoder, batches, job.config, job.world.sum, first=state.micro)
    while True:
        with _chance(job, state):
            scored = next(losses, None)
            if scored is None:
                return
            torch.autograd.backward(scored.loss)
        state.numbers = added(state.numbers, [scored.numbers])
        state.add(scored.loss)
        yield


@contextmanager
def _chance(job: Job, state: State) -> Iterator[None]:
    """What a method draws, dropout, NEFTune's noise, and LongLoRA's groups, while something is learned and only then.

    Drawn for the number of the micro-batch in the run, whichever process has it and whatever was drawn before: there is
    no state to keep.
    """
    alpha, number = job.config.neftune_alpha, job.world.rank + state.micro * job.world.size
    seeds = np.random.SeedSequence((job.config.seed, state.step, number))
    generator = torch.Generator().manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
    job.method.around.draw(job.deltas, generator)
    dropout.draw(job.deltas, generator)
    job.decoder.noise = partial(neftune, alpha=alpha, generator=generator) if alpha else None
    if job.method.groups:
        attend_in_groups(job.decoder, group_of(job.config))
    try:
        yield
    finally:
        job.decoder.noise = None
        if job.method.groups:
            attend_in_groups(job.decoder, None)
        job.method.around.draw(job.deltas, None)
        dropout.draw(job.deltas, None)


def _update(job: Job, state: State) -> tuple[float, float, float]:
    """The optimizer's step over the summed gradients → the loss of the step, the gradient's norm, the learning rate."""
    config, parameters = job.config, list(state.parameters.values())
    assert config.learning_rate is not None
    share = share_at(config.schedule, state.step, job.total, config.warmup_steps, config.decay_share)
    set_share(state.optimizer, share)
    job.world.sum_gradients(parameters)
    job.method.around.regularize(job.deltas)
    norm = clip(parameters, config.max_grad_norm)
    (loss,) = job.world.sum([state.partial])
    if math.isfinite(norm) and math.isfinite(loss):
        state.optimizer.step()
        job.method.around.allot(job.deltas, state.step + 1, job.total)
        state.in_a_row = 0
        if state.ema:
            state.ema.update()
    else:
        state.skipped, state.in_a_row = state.skipped + 1, state.in_a_row + 1
    state.optimizer.zero_grad(set_to_none=True)
    state.step, state.micro, state.partial, state.numbers = state.step + 1, 0, 0.0, {}
    return loss, norm, share * config.learning_rate
