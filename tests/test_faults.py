"""Whatever fails, and whenever: under a final name stands the old file or the new one, whole, and nothing is left over.

Every command that writes a model is broken at each call that makes a file durable, at several sizes of a disk, and
killed at named points. The checks that it passes are tested elsewhere, and are answered here in their place.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_atomic import Disk
from test_certificate import claimed, same
from test_export import make_adapter

from edgelora.base.model import open_base
from edgelora.errors import BaseModelError, EdgeloraError, OutputError
from edgelora.peft.adapter import TENSORS, write_adapter
from edgelora.pipeline.certificate import beside
from edgelora.pipeline.convert import convert
from edgelora.pipeline.export import Certificate, export
from edgelora.pipeline.merge import merge
from edgelora.pipeline.quantize import quantize
from edgelora.progress import OnProgress, silent

ADAPTER_PASSED = Certificate("F32", 8, 8, same(), same(), 1e-4, 1.0)


@dataclass(frozen=True)
class Bench:
    """A folder with a base, an adapter over it and a file that a command is to replace."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base.gguf"

    @property
    def adapter(self) -> Path:
        return self.folder / "mine"

    @property
    def out(self) -> Path:
        return self.folder / "results" / "out.gguf"

    def copy(self, folder: Path) -> Bench:
        shutil.copytree(self.folder, folder)
        return Bench(folder)

    def lay(self) -> None:
        self.out.parent.mkdir()
        self.out.write_bytes(b"old")
        beside(self.out).write_bytes(b"old too")

    @property
    def left(self) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in self.out.parent.iterdir() if p.is_file()}


def run_convert(bench: Bench, on_progress: OnProgress = silent) -> None:
    convert(bench.base, bench.out, overwrite=True, on_progress=on_progress)


def run_export(bench: Bench, on_progress: OnProgress = silent) -> None:
    export(bench.base, bench.adapter, bench.out, overwrite=True, on_progress=on_progress)


def run_merge(bench: Bench, on_progress: OnProgress = silent) -> None:
    merge(bench.base, [(bench.adapter, 1.0)], bench.out, overwrite=True, on_progress=on_progress)


def run_quantize(bench: Bench, on_progress: OnProgress = silent) -> None:
    quantize(bench.base, bench.out, "Q8_0", overwrite=True, on_progress=on_progress)


COMMANDS: dict[str, Callable[..., None]] = {
    "convert": run_convert, "export": run_export, "merge": run_merge, "quantize": run_quantize,
}  # fmt: skip
CARD = "out.certificate.json"
OLD = {"out.gguf": b"old", CARD: b"old too"}


@contextmanager
def passing(meanwhile: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Every check says that all is well; `meanwhile` happens while it is made."""

    def answer(found: object) -> Callable[..., object]:
        def check(*_: object, **__: object) -> object:
            meanwhile()
            return found

        return check

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgelora.pipeline.certificate.run_in_child", answer(claimed().compared))
        patch.setattr("edgelora.pipeline.export.run_in_child", answer(ADAPTER_PASSED))
        yield


@pytest.fixture(scope="module")
def prepared(tiny, tmp_path_factory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("faults") / "bench")
    bench.folder.mkdir()
    shutil.copyfile(tiny.path, bench.base)
    write_adapter(bench.adapter, make_adapter(open_base(bench.base)))
    bench.lay()
    return bench


@pytest.fixture(scope="module")
def good(prepared, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """What each command leaves where nothing fails."""
    results = {}
    for name, command in COMMANDS.items():
        bench = prepared.copy(tmp_path_factory.mktemp("good") / name)
        with passing():
            command(bench)
        results[name] = bench.left
    return results


def assert_whole(bench: Bench, wanted: dict[str, bytes], where: object) -> None:
    for name, raw in bench.left.items():
        assert raw in (OLD[name], wanted[name]), f"{name} is torn at {where}"
    missing = OLD.keys() ^ bench.left.keys()  # never the old certificate beside the new file, rather none
    assert not missing or (missing == {CARD} and bench.left["out.gguf"] == wanted["out.gguf"]), f"left over at {where}"
    assert (bench.left["out.gguf"], bench.left.get(CARD)) != (wanted["out.gguf"], OLD[CARD]), f"a lie at {where}"
    assert not list(bench.folder.rglob(".edgelora-*")), f"a draft is left at {where}"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_call_that_makes_a_file_durable_fails_in_turn(prepared, good, tmp_path, name):
    at, failed = 0, 0
    while True:
        at += 1
        bench = prepared.copy(tmp_path / str(at))
        with pytest.MonkeyPatch.context() as patch, passing():
            disk = Disk(patch, fail_at=at)
            told = ""
            try:
                COMMANDS[name](bench)
            except OutputError as e:
                told, failed = e.what, failed + 1
        assert ("No space left on device" in told) or bench.left == good[name], f"call {at} failed and nobody was told"
        assert_whole(bench, good[name], f"call {at}")
        if disk.calls < at:  # there was no such call any more
            break
    assert failed >= 4  # at least: the file and its name, its certificate and its name


@contextmanager
def room_for(n_bytes: int) -> Iterator[None]:
    """No file, of this process or a child of it, may grow beyond `n_bytes`: as on a full disk, the write fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_disk_is_full_at_any_byte(prepared, good, tmp_path, name):
    size = len(good[name]["out.gguf"])
    for n_bytes in (0, 4096, size // 3, 2 * size // 3, size - 1):
        bench = prepared.copy(tmp_path / str(n_bytes))
        with passing(), room_for(n_bytes), pytest.raises(EdgeloraError) as error:
            COMMANDS[name](bench)
        assert error.value.fix
        assert bench.left == OLD, f"{n_bytes} of {size} bytes"
        assert_whole(bench, good[name], n_bytes)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_base_that_changes_meanwhile_is_not_used(prepared, good, tmp_path, name):
    bench = prepared.copy(tmp_path / "bench")
    with passing(lambda: os.utime(bench.base, ns=(1, 1))), pytest.raises(BaseModelError, match="changed while it was"):
        COMMANDS[name](bench)
    assert bench.left == OLD
    assert_whole(bench, good[name], "a changed base")


@pytest.mark.parametrize("name", ["export", "merge"])
def test_an_adapter_that_changes_meanwhile_is_not_used(prepared, tmp_path, name):
    bench = prepared.copy(tmp_path / "bench")
    with passing(lambda: os.utime(bench.adapter / TENSORS, ns=(1, 1))), pytest.raises(BaseModelError) as error:
        COMMANDS[name](bench)
    assert TENSORS in error.value.what
    assert bench.left == OLD


# -- killed -------------------------------------------------------------------------------------------------------

# at which call of what, and whether the new file has its name by then
POINTS = {
    "while it writes": ("progress", False),
    "before its check": ("edgelora.pipeline.certificate.certify", False),
    "before it is signed": ("edgelora.pipeline.certificate.fill_reserved", False),
    "before it is named": ("pathlib.Path.replace", False),
    "before its certificate": ("pathlib.Path.replace", True),
}
KILLED = [("merge", point) for point in POINTS] + [(name, "before it is named") for name in COMMANDS if name != "merge"]


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def work_until(folder: Path, name: str, point: str) -> None:
    """In a process of its own: run the command, and be killed at `point`."""
    target, _ = POINTS[point]
    meanwhile = die if point == "before its check" else lambda: None
    with passing(meanwhile), pytest.MonkeyPatch.context() as patch:
        if target.startswith("edgelora") and point != "before its check":
            patch.setattr(target, die)
        elif target == "pathlib.Path.replace":
            real, calls = Path.replace, itertools.count()
            last = int(POINTS[point][1])  # the model is the first that gets its name, its certificate the second
            patch.setattr(Path, "replace", lambda *a: die() if next(calls) == last else real(*a))
        COMMANDS[name](Bench(folder), die if target == "progress" else silent)


@pytest.mark.parametrize(("name", "point"), KILLED)
def test_killed_the_old_file_stands_and_the_next_start_sweeps(prepared, good, tmp_path, name, point):
    bench = prepared.copy(tmp_path / "bench")
    process = multiprocessing.get_context("spawn").Process(target=work_until, args=(bench.folder, name, point))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    named = POINTS[point][1]
    assert bench.left["out.gguf"] == (good[name]["out.gguf"] if named else b"old")
    assert list(bench.out.parent.glob(".edgelora-*"))
    assert not named or CARD not in bench.left  # the old one is no longer true
    with passing():
        COMMANDS[name](bench)
    assert bench.left == good[name]
    assert_whole(bench, good[name], point)


def test_what_a_living_process_writes_is_not_swept(tmp_path):
    from edgelora.files.atomic import staged, sweep

    with staged(tmp_path / "out") as draft:
        draft.write_bytes(b"half")
        sweep(tmp_path)
        sweep(tmp_path, "out")
        draft.write_bytes(b"whole")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").read_bytes() == b"whole"
