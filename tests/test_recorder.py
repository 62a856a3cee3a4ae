"""What a run says behind its steps: how long the rest takes, once, and nothing to a terminal that was closed."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from edgelora.config import TrainConfig
from edgelora.progress import Progress
from edgelora.training.folder import RunFolder
from edgelora.training.interrupt import Interrupt
from edgelora.training.ready import Listeners
from edgelora.training.recorder import About, Recorder

NOTE = "about 5 min to go, at the pace of the first 3 steps"


@pytest.fixture
def recorder(tmp_path):
    """`recorder(interrupt=…, device=…, **listeners)`: one of a new run, which it writes down in tmp_path."""

    def make(interrupt=None, device="cpu", **listeners):
        folder = RunFolder(tmp_path / "adapter")
        folder.path.mkdir(exist_ok=True)
        about = About(TrainConfig(base="base.gguf", data="rows.jsonl", out=folder.out, device=device), {}, "a run")
        return Recorder(folder, about, Listeners(**listeners), interrupt or Interrupt())

    return make


@pytest.mark.parametrize(("eta_s", "notes"), [(290.0, [NOTE]), (59.0, []), (None, [])])
def test_how_long_the_rest_takes_is_said_once(recorder, eta_s, notes):
    told = []
    with recorder(on_note=told.append) as made:
        for step in range(1, 7):
            assert told == (notes if step > 3 else [])
            made.stepped(Progress("train", step, 99, loss=1.0, eta_s=eta_s), 10, 1.0)
    assert told == notes
    assert len(made.metrics()) == 6


@pytest.mark.parametrize("asked", [None, signal.SIGHUP])
def test_a_terminal_that_is_closed_does_not_end_the_step(recorder, asked):
    """What is written to it fails from the moment on in which the signal comes, and not before."""
    interrupt = Interrupt()
    interrupt.asked = asked

    def closed(_):
        raise OSError(5, "Input/output error")

    ends = nullcontext() if asked else pytest.raises(OSError, match="Input/output")
    with recorder(interrupt, on_progress=closed) as made:
        made.stepped(Progress("train", 1, 9, loss=1.0), 10, 1.0)
        assert made.asked_to_stop()  # once it is saved
        with ends:
            made.raise_lost()
    assert len(made.metrics()) == 1


def test_memory_is_that_of_the_device(recorder, monkeypatch):
    """Of a card what the plan speaks of, not what the process has beside it."""
    monkeypatch.setattr("torch.cuda.max_memory_reserved", lambda device: {"cuda:1": 123}[device])
    made = recorder(device="cuda:1")
    assert made.peak_bytes() == 123
    assert recorder(device="cpu").peak_bytes() > 1 << 20


def test_a_base_that_was_measured_is_no_step_of_a_pace(recorder):
    notes = []
    with recorder(on_note=notes.append) as made:
        made.stepped(Progress("train", 0, 9, held_out_loss=1.0), 0, 1.0)
        for step in (1, 2, 3):
            assert notes == []
            made.stepped(Progress("train", step, 9, loss=1.0, eta_s=290.0), 10, 1.0)
    assert notes == [NOTE]


@pytest.mark.parametrize(("in_a_row", "kept"), [(0, 2), (1, 3), (3, 5)])
def test_steps_that_taught_nothing_push_out_no_checkpoint(recorder, monkeypatch, in_a_row, kept):
    """The weights that all of them have may be what is wrong."""
    asked = []
    monkeypatch.setattr("edgelora.training.recorder.write_checkpoint", lambda *_, **how: asked.append(how["keep_last"]))
    state = SimpleNamespace(snapshot=lambda _: None, best=None, in_a_row=in_a_row)
    with recorder() as made:
        made.save(state)
    assert asked == [kept]
