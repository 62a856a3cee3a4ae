"""One run per folder: a second is refused with the first one's process id, and the first one's death frees the lock."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edgelora.errors import OutputError
from edgelora.files.lock import locked

HOLD = """
import sys, subprocess
from pathlib import Path
from edgelora.files.lock import locked
with locked(Path(sys.argv[1])):
    child = subprocess.Popen(["cat"], stdin=sys.stdin)  # lives on when this one is killed
    print("held", flush=True)
    child.wait()
"""


@contextmanager
def another_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock, and has a child of its own."""
    command = [sys.executable, "-c", HOLD, str(path)]
    root = Path(__file__).parent.parent
    process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        assert process.stdin is not None
        process.stdin.close()


def test_a_second_process_is_refused_with_the_first_ones_id(tmp_path):
    path = tmp_path / "mine.run" / "lock"
    with another_process(path) as process:
        with pytest.raises(OutputError) as caught, locked(path):
            pytest.fail("two at once")
        assert str(caught.value) == (
            f"{path.parent}: a run is at work here (process {process.pid})\n"
            "  why: two runs in one folder would overwrite each other's checkpoints\n"
            "  fix: wait until it ends, or choose another --out"
        )
    with locked(path):
        assert path.read_text() == str(os.getpid())


def test_a_killed_holder_frees_it_though_its_child_lives(tmp_path):
    path = tmp_path / "lock"
    with another_process(path) as process:
        process.kill()
        process.wait()
        with locked(path):
            assert path.read_text() == str(os.getpid())


def test_a_process_cannot_hold_it_twice(tmp_path):
    with locked(tmp_path / "lock"):
        for _ in range(2):  # a refusal takes nothing from the holder
            with pytest.raises(OutputError, match=f"process {os.getpid()}"), locked(tmp_path / "lock"):
                pytest.fail("two at once")


def test_it_is_free_after_the_block_however_that_ends(tmp_path):
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "lock"):
        raise KeyboardInterrupt
    with locked(tmp_path / "lock"):
        pass
    assert (tmp_path / "lock").exists()  # deleting it would let a second run in beside the first


@pytest.mark.parametrize("left", [b"", b"99999999999999999999999", b"four\n"])
def test_whatever_stands_in_the_file(tmp_path, left):
    (tmp_path / "lock").write_bytes(left)
    with locked(tmp_path / "lock"):
        assert (tmp_path / "lock").read_text() == str(os.getpid())
        (tmp_path / "lock").write_bytes(left)
        with pytest.raises(OutputError, match="a run is at work here"), locked(tmp_path / "lock"):
            pytest.fail("two at once")


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError, match="cannot be locked") as caught, locked(tmp_path / "lock"):
        pytest.fail("locked a link")
    assert caught.value.fix == "choose an --out on a disk of this machine that you may write to"
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_disk_without_locks_is_refused(tmp_path, monkeypatch):
    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("edgelora.files.lock.fcntl.flock", none)
    with pytest.raises(OutputError, match=r"cannot be locked \(No locks available\)"), locked(tmp_path / "lock"):
        pytest.fail("not locked")


def test_an_error_of_the_block_is_its_own(tmp_path):
    with pytest.raises(OSError, match="mine"), locked(tmp_path / "lock"):
        raise BlockingIOError(11, "mine")
