"""What a run says behind its first steps: how long the rest takes, once, and only where it takes a while."""

from __future__ import annotations

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
