"""What a run says behind its first steps: how long the rest takes, once, and only where it takes a while."""

from __future__ import annotations

import signal
from contextlib import nullcontext

import pytest

from edgelora.config import TrainConfig
from edgelora.progress import Progress
from edgelora.training.folder import RunFolder
from edgelora.training.metrics import read_metrics
from edgelora.training.recorder import Recorder

NOTE = "about 5 min to go, at the pace of the first 3 steps"


@pytest.mark.parametrize(("eta_s", "notes"), [(290.0, [NOTE]), (59.0, []), (None, [])])
def test_how_long_the_rest_takes_is_said_once(tmp_path, eta_s, notes):
    folder, told = RunFolder(tmp_path / "adapter"), []
    folder.path.mkdir()
    config = TrainConfig(base="base.gguf", data="rows.jsonl", out=folder.out)
    with Recorder(folder, config, {}, "a run", None) as recorder:
        recorder.on_note = told.append
        for step in range(1, 7):
            assert told == (notes if step > 3 else [])
            recorder.stepped(Progress("train", step, 99, loss=1.0, eta_s=eta_s), 10, 1.0)
    assert told == notes
    assert len(read_metrics(folder.metrics)) == 6


@pytest.mark.parametrize("asked", [None, signal.SIGHUP])
def test_a_terminal_that_is_closed_does_not_end_the_step(tmp_path, asked):
    """What is written to it fails from the moment on in which the signal comes, and not before."""
    folder = RunFolder(tmp_path / "adapter")
    folder.path.mkdir()

    def closed(_):
        raise OSError(5, "Input/output error")

    with Recorder(
        folder, TrainConfig(base="base.gguf", data="rows.jsonl", out=folder.out), {}, "a run", None
    ) as recorder:
        recorder.on_progress, recorder.interrupt.asked = closed, asked
        with nullcontext() if asked else pytest.raises(OSError, match="Input/output"):
            recorder.stepped(Progress("train", 1, 9, loss=1.0), 10, 1.0)
    assert len(read_metrics(folder.metrics)) == 1
