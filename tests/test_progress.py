"""What a moment of a long job says, and how speed, time and loss are averaged over it."""

from __future__ import annotations

import json
import math
import pickle

import pytest

from edgelora import progress
from edgelora.progress import Pace, Progress, Sample, Smoothed, as_json


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still: `clock[0]` is the time in seconds."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


# -- the averages -------------------------------------------------------------------------------------------------


def test_the_smoothed_loss_is_the_weighted_mean_of_all_losses():
    losses = [2.0, 1.0, 4.0, 0.5]
    smoothed = Smoothed()
    for n in range(1, 5):
        weights = [progress.SMOOTHING**back for back in range(n - 1, -1, -1)]  # the oldest weighs least
        mean = sum(w * x for w, x in zip(weights, losses, strict=False)) / sum(weights)
        assert smoothed.add(losses[n - 1]) == pytest.approx(mean, rel=1e-12)


def test_a_loss_that_is_not_finite_does_not_spoil_the_average():
    smoothed = Smoothed()
    assert smoothed.add(math.nan) is None
    assert smoothed.add(2.0) == 2.0
    assert [smoothed.add(x) for x in (math.inf, math.nan, None)] == [2.0] * 3


def test_pace_is_tokens_over_time_and_the_steps_left(clock):
    pace = Pace(10)
    clock[0] += 2.0
    assert pace.step(100) == (50.0, 18.0)  # one step in 2 s, nine to go
    clock[0] += 2.0
    assert pace.step(500, steps=3) == (150.0, 6.0)  # four steps in 4 s, six to go


def test_steps_of_an_earlier_run_are_neither_work_nor_time(clock):
    pace = Pace(10, first=6)
    clock[0] += 2.0
    assert pace.step(100) == (50.0, 6.0)  # step 7 took 2 s, three to go


def test_what_happens_aside_takes_time_but_slows_no_token(clock):
    pace = Pace(4)
    clock[0] += 2.0
    with pace.aside():
        clock[0] += 6.0
    speed, eta = pace.step(100)
    assert speed == 50.0
    assert eta == 24.0  # three more such steps, each with its 6 s


def test_a_measurement_slows_no_step_and_counts_as_often_as_it_will_come(clock):
    """Of the base before the first step, too: it comes once, not with every step."""
    pace = Pace(10)
    with pace.aside(measures=True):
        clock[0] += 30.0
    clock[0] += 2.0
    assert pace.step(100, measurements=2) == (50.0, 9 * 2.0 + 2 * 30.0)
    with pace.aside(measures=True):
        clock[0] += 50.0
    clock[0] += 2.0
    assert pace.step(100, measurements=1) == (50.0, 8 * 2.0 + 40.0)


# -- as JSON ------------------------------------------------------------------------------------------------------


def test_a_progress_as_json_has_what_applies_and_nothing_else():
    assert as_json(Progress("merge", 3, 9, eta_s=1.5)) == {
        "event": "progress", "stage": "merge", "step": 3, "total": 9, "eta_s": 1.5,
    }  # fmt: skip


def test_a_progress_as_json_is_json_whatever_the_loss_is():
    said = as_json(Progress(
        "train", 1, 2, loss=math.nan, grad_norm=math.inf, skipped_steps=1, samples=(Sample("Hi", "Ho", False),)
    ))  # fmt: skip
    again = json.loads(json.dumps(said, allow_nan=False))
    assert (again["loss"], again["grad_norm"], again["skipped_steps"]) == (None, None, 1)
    assert again["samples"] == [{"prompt": "Hi", "text": "Ho", "ended": False}]


def test_a_progress_travels_from_a_child_process():
    event = Progress("train", 1, 2, loss=0.5, samples=(Sample("Hi", "Ho"),))
    assert pickle.loads(pickle.dumps(event)) == event
