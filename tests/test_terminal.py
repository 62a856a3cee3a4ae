"""A terminal that is closed, and a reader that ends with the run: nothing of a step is lost, nor the exit code."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from example_runs import example_rows
from test_interrupt import HANG_UP

from edgelora.cli import run
from edgelora.cli.terminal import Outliving
from edgelora.errors import OutputError
from edgelora.training.checkpoint import read_checkpoint
from edgelora.training.interrupt import interruptible
from edgelora.training.metrics import read_metrics

pty = pytest.importorskip("pty", reason="this platform has no terminals of its own")

pytestmark = HANG_UP

# takes the terminal that it is given as its own, as a shell's child has it, and becomes the command
IN_TERMINAL = """
import fcntl, os, sys, termios
terminal = os.open(sys.argv[1], os.O_RDWR)
for number in range(3):
    os.dup2(terminal, number)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.fixture
def training(tiny, tmp_path) -> tuple[list[str], Path]:
    """The words of a run that is plain about what it says, and its folder."""
    rows = example_rows(tmp_path / "rows.jsonl", 0, 8)
    words = ["train", tiny.path, rows, "--out", tmp_path / "mine", "--epochs", 500, "--rank", 2, "--save-every", 1000]
    return [sys.executable, "-m", "edgelora", *map(str, words)], tmp_path / "mine.run"


@contextmanager
def watched(master: int) -> Iterator[None]:
    """A person who reads what a terminal shows: else it would be full, and the run would wait."""
    leave = threading.Event()

    def read() -> None:
        while not leave.is_set():
            if select.select([master], [], [], 0.02)[0]:
                os.read(master, 1 << 16)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield
    finally:
        leave.set()
        reader.join()


def require_saved(folder: Path) -> None:
    """The last step that was done stands in a checkpoint."""
    done = read_metrics(folder / "metrics.jsonl")[-1].step
    assert [read_checkpoint(path).step for path in (folder / "checkpoints").iterdir()] == [done]


def test_a_closed_terminal_lets_the_step_finish_and_saves(training, at_first_step: Callable[..., Any]):
    command, folder = training
    master, slave = pty.openpty()
    started = [sys.executable, "-c", IN_TERMINAL, os.ttyname(slave), *command]
    with watched(master):
        process = at_first_step(started, folder / "metrics.jsonl", start_new_session=True)
    os.close(slave)
    os.close(master)
    assert process.wait(timeout=60) == 129
    require_saved(folder)


@pytest.mark.exhaustive
def test_a_reader_that_ctrl_c_ended_too_costs_nothing(training, at_first_step: Callable[..., Any]):
    """`edgelora train ... 2>&1 | tee log`: the signal goes to both."""
    command, folder = training
    process = at_first_step(command, folder / "metrics.jsonl")
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    require_saved(folder)


@pytest.fixture
def unread() -> Iterator[Outliving]:
    """A pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    with Outliving(writer, "wb") as stream:
        yield stream


def test_a_closed_pipe_is_an_error_until_a_training_is_asked_to_stop(unread):
    with interruptible():
        with pytest.raises(BrokenPipeError):
            unread.write(b"one")
        os.kill(os.getpid(), signal.SIGINT)
        assert unread.write(b"another") == 7
    assert unread.write(b"and on") == 6  # it does not come back


def test_a_closed_pipe_is_an_error_until_the_command_ends_so(unread, monkeypatch):
    with pytest.raises(BrokenPipeError):
        unread.write(b"one")
    monkeypatch.setattr(Outliving, "stopping", True)
    assert unread.write(b"another") == 7


@pytest.fixture
def full() -> Iterator[Outliving]:
    """A disk without room."""
    if not Path("/dev/full").exists():
        pytest.skip("this platform has no /dev/full")
    with Outliving("/dev/full", "wb") as stream:
        yield stream


def test_a_full_disk_is_one_error_and_then_quiet(full):
    with pytest.raises(OutputError) as error:
        full.write(b"one")
    assert str(error.value).splitlines() == [
        "standard output cannot be written: No space left on device",
        "  why: the file or disk behind it takes no more, and what it did not take is lost",
        "  fix: make room there or send it elsewhere, and give the command again",
    ]
    assert full.write(b"another") == 7


@pytest.mark.parametrize("words", [["methods"], ["methods", "--json"], ["methods", "--help"]], ids=" ".join)
def test_a_result_that_is_not_written_is_told_of_by_the_command(full, unread, monkeypatch, capsys, words):
    """Also where all of it was still in memory; a reader that is gone needs no telling."""
    for stream, said in ((full, "standard output cannot be written"), (unread, "")):
        with io.TextIOWrapper(io.BufferedWriter(stream, 1 << 20), encoding="utf-8") as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            assert run(words) == 1
            monkeypatch.undo()
        told = capsys.readouterr().err
        assert said in told
        assert len(told.splitlines()) == (0 if not said else 1 if "--json" in words else 3)


def test_what_is_read_is_written(tmp_path):
    with io.TextIOWrapper(Outliving(tmp_path / "talk", "wb"), encoding="utf-8") as stream:
        stream.write("grüße\n")
    assert (tmp_path / "talk").read_text(encoding="utf-8") == "grüße\n"
