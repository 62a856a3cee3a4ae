"""metrics.jsonl, TensorBoard's event files and the pictures of a run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from edgelora.errors import FileFormatError, OutputError
from edgelora.progress import Progress, Sample
from edgelora.training.metrics import Metrics, MetricsLog, as_line, metrics_of, read_metrics

LINES = [
    Metrics(0, 0.0, held_out_loss=2.5),
    Metrics(1, 0.1, 1 / 3, None, 1e-4, 0.7, 100, 50.0, 2.0, 10**9),
    Metrics(2, 0.2, math.nan, None, 2e-4, None, 110, 51.0, 4.0, 10**9, skipped_steps=1),
    Metrics(3, 0.3, 0.1, 0.2 + 0.1, 2e-4, 0.5, 90, 50.5, 6.0, 10**9, 1, (Sample("Hi", "Hö\nho", False),)),
    Metrics(4, 0.4, 0.6, numbers={"rewards/chosen": 1 / 3}, held_out_numbers={"rewards/accuracies": 0.75}),
]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def written(path, lines=LINES, after=None):
    with MetricsLog(path, after) as log:
        for line in lines:
            log.append(line)
    return path


def same(ours, theirs):
    """Equal to the last bit, NaN included."""
    return [repr(m) for m in ours] == [repr(m) for m in theirs]


# -- each step exactly once ---------------------------------------------------------------------------------------


def test_what_was_written_is_read(path):
    assert same(read_metrics(written(path)), LINES)


def test_a_new_run_begins_a_new_file(path):
    written(path)
    assert same(read_metrics(written(path, LINES[:1])), LINES[:1])


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("torn", [b"", b'{"step": 4, "epo', b"\0\0\0"])
def test_a_run_that_goes_on_leaves_the_file_of_one_that_was_never_stopped(path, tmp_path, after, torn):
    with written(path).open("ab") as file:
        file.write(torn)
    written(path, LINES[after + 1 :], after)
    assert path.read_bytes() == written(tmp_path / "whole.jsonl").read_bytes()


def test_a_run_goes_on_where_there_is_no_file(path):
    assert same(read_metrics(written(path, LINES[2:], after=1)), LINES[2:])


KILLED = """
import os, sys
from pathlib import Path
from edgelora.training.metrics import Metrics, MetricsLog
log = MetricsLog(Path(sys.argv[1]), None)
for step in range(5):
    log.append(Metrics(step, 0.0, 1.0))
os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_line_outlives_the_process_that_wrote_it(path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], timeout=60, check=False)
    assert done.returncode == -9
    assert [m.step for m in read_metrics(path)] == [0, 1, 2, 3, 4]


def test_every_whole_line_is_in_the_file_at_once(path):
    with MetricsLog(path, None) as log:
        for n, line in enumerate(LINES, 1):
            log.append(line)
            log.sync()
            assert len(read_metrics(path)) == n


def test_a_step_tells_its_metrics():
    event = Progress(
        "train", 7, 9, loss=0.5, learning_rate=1e-4, tokens_per_s=99.0, eta_s=2.0, peak_bytes=5, epoch=0.7,
        smoothed_loss=0.6, held_out_loss=0.4, grad_norm=0.1, skipped_steps=2, samples=(Sample("a", "b"),),
        numbers={"rewards/margins": 0.5}, held_out_numbers={"rewards/margins": 0.25},
    )  # fmt: skip
    assert metrics_of(event, tokens=40, seconds=3.0) == Metrics(
        step=7, epoch=0.7, loss=0.5, held_out_loss=0.4, learning_rate=1e-4, grad_norm=0.1, tokens=40,
        tokens_per_s=99.0, seconds=3.0, peak_bytes=5, skipped_steps=2, samples=(Sample("a", "b"),),
        numbers={"rewards/margins": 0.5}, held_out_numbers={"rewards/margins": 0.25},
    )  # fmt: skip


# -- the bytes ----------------------------------------------------------------------------------------------------


def test_a_line_of_the_file():
    assert as_line(Metrics(3, 0.5, 0.1, 0.25, 2e-4, 0.5, 90, 45.0, 2.0, 1000, 1, (Sample("Hi", "Hö"),))) == (
        '{"step": 3, "epoch": 0.5, "loss": 0.1, "loss_hex": "0x1.999999999999ap-4", "held_out_loss": 0.25, '
        '"held_out_loss_hex": "0x1.0000000000000p-2", "learning_rate": 0.0002, "grad_norm": 0.5, "tokens": 90, '
        '"tokens_per_s": 45.0, "seconds": 2.0, "peak_bytes": 1000, "skipped_steps": 1, '
        '"samples": [{"prompt": "Hi", "text": "Hö", "ended": true}]}\n'
    )


def test_the_numbers_of_an_objective_stand_in_a_line():
    line = as_line(Metrics(1, 0.5, 0.25, numbers={"rewards/chosen": 0.5}, held_out_numbers={"rewards/margins": -0.1}))
    assert line == (
        '{"step": 1, "epoch": 0.5, "loss": 0.25, "loss_hex": "0x1.0000000000000p-2", "skipped_steps": 0, '
        '"numbers": {"rewards/chosen": 0.5}, "held_out_numbers": {"rewards/margins": -0.1}}\n'
    )


def test_a_loss_that_is_not_finite_is_null_and_its_hex_says_what_it_was():
    fields = json.loads(as_line(Metrics(1, 0.0, math.nan, grad_norm=-math.inf)))
    assert (fields["loss"], fields["loss_hex"], fields["grad_norm"]) == (None, "nan", None)


# -- faults -------------------------------------------------------------------------------------------------------


def test_lines_that_are_not_ours_are_all_named(path):
    whole = written(path).read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([whole[0], b"{\n", whole[1], b"[1]\n", b'{"step": "x", "epoch": 1}\n', whole[2]]))
    with pytest.raises(FileFormatError) as caught:
        read_metrics(path)
    assert [f"line {n}" in caught.value.what for n in range(1, 7)] == [False, True, False, True, True, False]
    assert caught.value.fix.startswith("restore the file, or delete it")
    before = path.read_bytes()
    with pytest.raises(FileFormatError):
        MetricsLog(path, after=1)
    assert path.read_bytes() == before


def test_no_file_is_said_so(path):
    with pytest.raises(FileFormatError, match="No such file"):
        read_metrics(path)


@contextmanager
def full_disk():
    """In here files cannot grow beyond 150 bytes: that of pytest's own report neither, so not around the whole test."""
    resource = pytest.importorskip("resource", reason="Windows has no limits of files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_three_lines_and_the_run_goes_on_later(path):
    with full_disk(), pytest.raises(OutputError) as caught:
        written(path)
    assert caught.value.what == f"{path}: could not be written (File too large)"
    assert "--resume" in caught.value.fix
    assert same(read_metrics(path), LINES[:1])  # the second line is torn
    assert path.stat().st_size == 150
    written(path, [], after=0)
    assert path.read_text() == as_line(LINES[0])
