"""TensorBoard's event files, read back by TensorBoard."""

from __future__ import annotations

import math
import sys
from contextlib import ExitStack, closing

import pytest

from edgelora.errors import ConfigError, OutputError
from edgelora.progress import Sample
from edgelora.training.metrics import Metrics
from edgelora.training.tensorboard import TensorBoardLog

LINES = [
    Metrics(1, 0.1, 0.75, None, 1e-4, 0.5, 100, 50.0, 2.0, 2**30),
    Metrics(2, 0.2, math.nan, None, 2e-4, math.inf, 110, 51.0, 4.0, 2**30, skipped_steps=1),
    Metrics(3, 0.3, 0.5, 0.625, 2e-4, 0.25, 90, 52.0, 6.0, 2**30, samples=(Sample("Hi", "Ho"),)),
    Metrics(4, 0.4, 0.25, numbers={"rewards/chosen": 0.5}, held_out_numbers={"rewards/chosen": 0.125}),
]


@pytest.fixture
def read():
    """`read(folder)`: what TensorBoard shows, {tag: [(step, value)]}."""
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="pip install tensorboard"
    )

    def shown(folder):
        events = event_accumulator.EventAccumulator(str(folder)).Reload()
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    return shown


def test_tensorboard_shows_what_was_measured(read, tmp_path):
    with TensorBoardLog(tmp_path, None) as log:
        for line in LINES:
            log.append(line)
    shown = read(tmp_path)
    assert shown["loss/train"] == [(1, 0.75), (3, 0.5), (4, 0.25)]
    assert (shown["rewards/chosen"], shown["rewards/chosen/held-out"]) == ([(4, 0.5)], [(4, 0.125)])
    assert shown["loss/held-out"] == [(3, 0.625)]
    assert shown["grad_norm"] == [(1, 0.5), (3, 0.25)]
    assert shown["learning_rate"] == [(i, pytest.approx(x, rel=1e-6)) for i, x in ((1, 1e-4), (2, 2e-4), (3, 2e-4))]
    assert shown["speed/tokens_per_s"] == [(1, 50.0), (2, 51.0), (3, 52.0)]
    assert shown["memory/peak_bytes"] == [(i, 2.0**30) for i in (1, 2, 3)]


def test_a_run_that_goes_on_shows_each_step_once(read, tmp_path):
    with TensorBoardLog(tmp_path, None) as log:
        for line in LINES:
            log.append(line)
    with TensorBoardLog(tmp_path, after=1) as log:
        log.append(Metrics(2, 0.2, 0.7))
    assert read(tmp_path)["loss/train"] == [(1, 0.75), (2, pytest.approx(0.7, rel=1e-6))]


def test_without_the_package_it_is_said_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError) as caught:
        TensorBoardLog(tmp_path, None)
    assert caught.value.what == "--tensorboard: the package tensorboard is not installed"
    assert caught.value.fix.startswith("pip install 'edgelora[tensorboard]'")
    assert list(tmp_path.iterdir()) == []


class Full:
    """A writer on a full disk."""

    def __init__(self, *_, **__):
        pass

    def add_scalar(self, *_):
        raise OSError(28, "No space left on device")

    add_text = close = add_scalar


@pytest.fixture
def full(tmp_path, monkeypatch):
    writers = pytest.importorskip("torch.utils.tensorboard", reason="pip install tensorboard")
    monkeypatch.setattr(writers, "SummaryWriter", Full)
    return TensorBoardLog(tmp_path, None)


def test_a_full_disk_is_a_typed_error(full, tmp_path):
    with pytest.raises(OutputError) as appended, full:
        full.append(LINES[0])
    with pytest.raises(OutputError) as closed, full:
        pass
    for caught in (appended, closed):
        assert str(caught.value) == (
            f"{tmp_path}: could not be written (No space left on device)\n"
            "  why: the disk refused; the checkpoints that stand are untouched\n"
            "  fix: free some space, then run the command again with --resume"
        )


def test_a_folder_that_cannot_be_made_is_a_typed_error(tmp_path):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="could not be written"), TensorBoardLog(tmp_path / "file" / "board", None):
        pass


def closed_by_a_stack(board):
    """Who closes a stack of contexts does not hand on what ended them."""
    stack = ExitStack()
    stack.enter_context(board)
    return closing(stack)


@pytest.mark.parametrize("within", [lambda board: board, closed_by_a_stack], ids=["alone", "in a stack"])
def test_what_ended_the_run_is_told_before_a_full_disk(full, within):
    with pytest.raises(KeyError, match="the run's own"), within(full):
        raise KeyError("the run's own")
