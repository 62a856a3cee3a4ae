"""TensorBoard's event files, read back by TensorBoard."""

from __future__ import annotations

import math
import sys

import pytest

from edgelora.errors import ConfigError
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
