"""What a run measures now and then: the loss over the rows held out, whether it is the best, and a few answers."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from edgelora.training.job import Job
from edgelora.training.objectives.objective import added, over_all, score_held_out
from edgelora.training.state import Best, State


def averaged(state: State) -> AbstractContextManager[None]:
    """In here the parameters are what is kept: their moving average, where there is one."""
    return nullcontext() if state.ema is None or not state.ema.steps else state.ema.swapped()


def over_held_out(job: Job, state: State) -> tuple[float, dict[str, float]]:
    """The objective's mean loss over the rows held out (for answers mean −log p in nats), and its numbers beside it."""
    assert job.config.micro_batch_tokens is not None
    rows = [job.held_out[i] for i in range(len(job.held_out))]
    batches = job.world.share(job.objective.pack(rows, job.config.micro_batch_tokens))
    with averaged(state):
        scored = score_held_out(job.objective, job.decoder, batches, job.config, job.world.sum)
    (loss,) = job.world.sum([sum(float(one.loss) for one in scored)])
    return loss, over_all(job.objective.shows, added({}, (one.numbers for one in scored)), job.world.sum)


def measure(job: Job, state: State, step: int) -> dict[str, Any]:
    """The held-out loss and the answers to the fixed prompts, if their time has come."""
    if not job.is_measured(step):
        return {}
    measured: dict[str, Any] = {}
    if len(job.held_out):
        loss, numbers = over_held_out(job, state)
        measured |= {"held_out_loss": loss, "held_out_numbers": numbers}
        if step:
            measured["best"] = _is_best(state, step, loss)
        else:
            state.base_loss = loss  # what there is to improve on is no candidate
    if job.sampler is not None:
        with averaged(state):
            measured["samples"] = job.sampler(job.decoder)
    return measured


def _is_best(state: State, step: int, loss: float) -> bool:
    """Whether no held-out loss before was as low, not even the base's.

    `state` remembers the lowest of all steps, be it above the base's, and for how long there was none.
    """
    is_lowest = math.isfinite(loss) and (state.best is None or loss < state.best.loss)
    state.stale = 0 if is_lowest else state.stale + 1
    if is_lowest:
        state.best = Best(step, loss)
    return is_lowest and not (state.base_loss is not None and state.base_loss <= loss)
