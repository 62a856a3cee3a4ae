"""Whatever fails, and whenever: under a final name stands the old file or the new one, whole, and nothing is left over.

Every command that writes a model is broken at each call that makes a file durable, at several sizes of a disk, and
killed at named points. The checks that it passes are tested elsewhere, and are answered here in their place.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from forked import processes
from test_atomic import Disk, lay, tree
from test_certificate import claimed, same
from test_export import make_adapter
from test_split import split

from edgelora.base.activations import ActivationSums
from edgelora.base.model import open_base
from edgelora.errors import BaseModelError, EdgeloraError, OutputError
from edgelora.peft.adapter import TENSORS, write_adapter
from edgelora.pipeline.certificate import Reference
from edgelora.pipeline.convert import convert
from edgelora.pipeline.export import Certificate, ExportOptions, export
from edgelora.pipeline.imatrix import Mix, Settings, compute_importance
from edgelora.pipeline.merge import merge
from edgelora.pipeline.quantize import QuantizeSettings, quantize
from edgelora.pipeline.runners import prepare_for
from edgelora.progress import OnProgress, silent

ADAPTER_PASSED = Certificate("F32", 8, 8, same(), same(), 1e-4, 1.0)
TEXT = "the old harbour was quiet " * 40


@dataclass(frozen=True)
class Bench:
    """A folder with what commands read, and `results`, where they write over something older."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base.gguf"

    @property
    def parts(self) -> Path:
        """The same model in several files: the first of them."""
        return min((self.folder / "parts").iterdir())

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def adapter(self) -> Path:
        return self.folder / "mine"

    @property
    def text(self) -> Path:
        return self.folder / "text.txt"

    @property
    def results(self) -> Path:
        return self.folder / "results"

    @property
    def out(self) -> Path:
        return self.results / "out.gguf"

    def copy(self, folder: Path, old: dict[str, bytes]) -> Bench:
        """The same somewhere else, with `old` to be replaced."""
        shutil.copytree(self.folder, folder)
        lay(folder / "results", old)
        return Bench(folder)

    @property
    def left(self) -> dict[str, bytes]:
        files = {name: raw for name, raw in tree(self.results).items() if not name.startswith(".edgelora-")}
        return {name: raw.replace(str(self.folder).encode(), b"HERE") for name, raw in files.items()}


def run_convert(bench: Bench, on_progress: OnProgress = silent) -> None:
    convert(bench.base, bench.out, overwrite=True, on_progress=on_progress)


def run_export(bench: Bench, on_progress: OnProgress = silent) -> None:
    export(bench.base, bench.adapter, bench.out, ExportOptions(overwrite=True), on_progress)


def run_merge(bench: Bench, on_progress: OnProgress = silent) -> None:
    merge(bench.base, [(bench.adapter, 1.0)], bench.out, overwrite=True, on_progress=on_progress)


def run_merge_to_folder(bench: Bench, on_progress: OnProgress = silent) -> None:
    parts = [(bench.adapter, 1.0)]
    merge(bench.checkpoint, parts, bench.results / "out", quant="hf", overwrite=True, on_progress=on_progress)


def run_quantize(bench: Bench, on_progress: OnProgress = silent) -> None:
    quantize(bench.base, bench.out, "Q8_0", overwrite=True, on_progress=on_progress)


def run_keep_split(bench: Bench, on_progress: OnProgress = silent) -> None:
    settings = QuantizeSettings(keep_split=True)
    quantize(bench.parts, bench.results / "out", "Q8_0", settings, overwrite=True, on_progress=on_progress)


def run_imatrix(bench: Bench, on_progress: OnProgress = silent) -> None:
    settings = Settings(Mix(None, bench.text, window=64), engine="torch")
    compute_importance(bench.base, [], bench.out, settings, overwrite=True, on_progress=on_progress)


def run_for(runner: str, bench: Bench, on_progress: OnProgress = silent) -> None:
    """As `merge --for` does: what the runner needs is known before the work, and written after it."""
    made_of = Reference(bench.base, ((bench.adapter, 1.0),))
    delivery = prepare_for(runner, made_of, bench.out, live=False, overwrite=True)
    run_merge(bench, on_progress)
    assert delivery is not None
    delivery.write()


CARD = "out.certificate.json"
OLD = {"out.gguf": b"old", CARD: b"old too"}
OLD_FOLDER = {"out/config.json": b"{}", "out/old": b"old", CARD: json.dumps({"files": {"config.json": ""}}).encode()}
SCRIPT, LINK = "out.llama-server.sh", "edgelora/out/out.gguf"


@dataclass(frozen=True)
class Command:
    """What is broken, and what it is to replace."""

    run: Callable[..., None]
    old: dict[str, bytes]
    durable: int = 4
    """Calls that make a file durable, at least: the file and its name, its certificate and its name."""


COMMANDS: dict[str, Command] = {
    "convert": Command(run_convert, OLD),
    "export": Command(run_export, OLD),
    "merge": Command(run_merge, OLD),
    "merge to a folder": Command(run_merge_to_folder, OLD_FOLDER, 10),
    "merge for llama-server": Command(partial(run_for, "llama-server"), {**OLD, SCRIPT: b"old"}, 6),
    "merge for lmstudio": Command(partial(run_for, "lmstudio"), {**OLD, LINK: b"old"}, 6),
    "quantize": Command(run_quantize, OLD),
    "quantize in parts": Command(run_keep_split, OLD_FOLDER, 6),
    "imatrix": Command(run_imatrix, {"out.gguf": b"old"}, 2),
}


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
        patch.setattr("edgelora.pipeline.export.certify_adapter", answer(ADAPTER_PASSED))
        patch.setattr("edgelora.pipeline.imatrix.run_in_child", answer(SUMS))
        yield


NAME = "blk.0.attn_q.weight"
SUMS = ActivationSums({NAME: 1}, {NAME: np.ones((1, 256))}, {NAME: np.ones(1, np.int64)})


@pytest.fixture(scope="module")
def prepared(tiny, transformers_model, vocabulary, write_tokenizer, tmp_path_factory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("faults") / "bench")
    bench.folder.mkdir()
    shutil.copyfile(tiny.path, bench.base)
    split(tiny.path, bench.folder / "parts")
    transformers_model(tiny).save_pretrained(bench.checkpoint)
    write_tokenizer(bench.checkpoint, vocabulary, open_base(tiny.path).own_template)
    write_adapter(bench.adapter, make_adapter(open_base(bench.base)))
    bench.text.write_text(TEXT, encoding="utf-8")
    return bench


@pytest.fixture(scope="module")
def good(prepared, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """What each command leaves where nothing fails."""
    results = {}
    for name, command in COMMANDS.items():
        bench = prepared.copy(tmp_path_factory.mktemp("good") / "bench", command.old)
        with passing():
            command.run(bench)
        results[name] = bench.left
    return results


def units(files: dict[str, bytes]) -> dict[str, dict[str, bytes]]:
    """What gets its name in one step, by that name: a file, or a folder with all that is in it."""
    found: dict[str, dict[str, bytes]] = {}
    for name, raw in files.items():
        found.setdefault("out" if name.startswith("out/") else name, {})[name] = raw
    return found


def assert_whole(bench: Bench, name: str, wanted: dict[str, bytes], where: object) -> None:
    """Each thing is the old one or the new one, and no certificate stands beside what it was not made for."""
    left, old, new = units(bench.left), units(COMMANDS[name].old), units(wanted)
    for unit, files in left.items():
        assert files in (old.get(unit), new.get(unit)), f"{unit} is torn at {where}"
    model = "out" if "out" in new else "out.gguf"
    missing = (old.keys() & new.keys()) - left.keys()
    assert not missing or (missing == {CARD} and left[model] == new[model]), f"{missing} gone at {where}"
    if CARD in left and left[model] == new[model]:
        assert left[CARD] == new[CARD], f"a lie at {where}"
    assert not list(bench.folder.rglob(".edgelora-*")), f"a draft is left at {where}"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_call_that_makes_a_file_durable_fails_in_turn(prepared, good, tmp_path, name):
    at, failed = 0, 0
    while True:
        at += 1
        bench = prepared.copy(tmp_path / str(at), COMMANDS[name].old)
        with pytest.MonkeyPatch.context() as patch, passing():
            disk = Disk(patch, fail_at=at)
            told = ""
            try:
                COMMANDS[name].run(bench)
            except OutputError as e:
                told, failed = e.what, failed + 1
        assert ("No space left on device" in told) or bench.left == good[name], f"call {at} failed and nobody was told"
        assert_whole(bench, name, good[name], f"call {at}")
        shutil.rmtree(bench.folder)
        if disk.calls < at:  # there was no such call any more
            break
    assert failed >= COMMANDS[name].durable


@contextmanager
def room_for(n_bytes: int) -> Iterator[None]:
    """No file, of this process or a child of it, may grow beyond `n_bytes`: as on a full disk, the write fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("spawned")  # with the limits of this process
@pytest.mark.parametrize("name", COMMANDS)
def test_the_disk_is_full_at_any_byte(prepared, good, tmp_path, name):
    size = max(len(raw) for file, raw in good[name].items() if file != CARD)
    for n_bytes in sorted({0, min(4096, size // 2), size // 3, 2 * size // 3, size - 1}):
        bench = prepared.copy(tmp_path / str(n_bytes), COMMANDS[name].old)
        with passing(), room_for(n_bytes), pytest.raises(EdgeloraError) as error:
            COMMANDS[name].run(bench)
        assert error.value.fix
        assert bench.left == COMMANDS[name].old, f"{n_bytes} of {size} bytes"
        assert_whole(bench, name, good[name], n_bytes)
        shutil.rmtree(bench.folder)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_base_that_changes_meanwhile_is_not_used(prepared, good, tmp_path, name):
    bench = prepared.copy(tmp_path / "bench", COMMANDS[name].old)
    read = {"merge to a folder": bench.checkpoint / "model.safetensors", "quantize in parts": bench.parts}
    base = read.get(name, bench.base)
    with passing(lambda: os.utime(base, ns=(1, 1))), pytest.raises(BaseModelError, match="changed while it was"):
        COMMANDS[name].run(bench)
    assert bench.left == COMMANDS[name].old
    assert_whole(bench, name, good[name], "a changed base")


@pytest.mark.parametrize("name", ["export", "merge", "merge to a folder"])
def test_an_adapter_that_changes_meanwhile_is_not_used(prepared, tmp_path, name):
    bench = prepared.copy(tmp_path / "bench", COMMANDS[name].old)
    with passing(lambda: os.utime(bench.adapter / TENSORS, ns=(1, 1))), pytest.raises(BaseModelError) as error:
        COMMANDS[name].run(bench)
    assert TENSORS in error.value.what
    assert bench.left == COMMANDS[name].old


# -- killed -------------------------------------------------------------------------------------------------------

# at which call of what, and whether the new file has its name by then
POINTS = {
    "while it writes": ("progress", False),
    "before its check": ("edgelora.pipeline.certificate.certify", False),
    "before it is signed": ("edgelora.pipeline.certificate.fill", False),
    "before it is named": ("pathlib.Path.replace", False),
    "before its certificate": ("pathlib.Path.replace", True),
}
LONGEST = ("merge", "merge to a folder")  # at every point; the others before their result is named
KILLED = [(name, point) for name in COMMANDS for point in POINTS if name in LONGEST or point == "before it is named"]
KILLED.remove(("merge to a folder", "before it is signed"))  # a folder has its certificate beside it only


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def naming(name: str, *, after: bool) -> tuple[str, int]:
    """The call, and which of them, before the result of a command gets its name, or `after` that its certificate."""
    if "out/old" not in COMMANDS[name].old:
        return "replace", int(after)
    return ("replace", 0) if after else ("rename", 1)  # the old certificate goes aside, then the old folder


def work_until(folder: Path, name: str, point: str) -> None:
    """In a process of its own: run the command, and be killed at `point`."""
    target, _ = POINTS[point]
    meanwhile = die if point == "before its check" else lambda: None
    with passing(meanwhile), pytest.MonkeyPatch.context() as patch:
        if target.startswith("edgelora") and point != "before its check":
            patch.setattr(target, die)
        elif target == "pathlib.Path.replace":
            how, last = naming(name, after=POINTS[point][1])
            real, calls = getattr(Path, how), itertools.count()
            patch.setattr(Path, how, lambda *a: die() if next(calls) == last else real(*a))
        COMMANDS[name].run(Bench(folder), die if target == "progress" else silent)


@pytest.mark.parametrize(("name", "point"), KILLED)
def test_killed_the_old_file_stands_and_the_next_start_sweeps(prepared, good, tmp_path, name, point):
    old = COMMANDS[name].old
    bench = prepared.copy(tmp_path / "bench", old)
    process = processes().Process(target=work_until, args=(bench.folder, name, point))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    model, named = "out" if "out/old" in old else "out.gguf", POINTS[point][1]
    assert units(bench.left)[model] == units(good[name] if named else old)[model]
    assert list(bench.results.glob(".edgelora-*"))
    assert not named or CARD not in bench.left  # the old one is no longer true
    with passing():
        COMMANDS[name].run(bench)
    assert bench.left == good[name]
    assert_whole(bench, name, good[name], point)


def test_what_a_living_process_writes_is_not_swept(tmp_path):
    from edgelora.files.atomic import staged, sweep

    with staged(tmp_path / "out") as draft:
        draft.write_bytes(b"half")
        sweep(tmp_path)
        sweep(tmp_path, "out")
        draft.write_bytes(b"whole")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").read_bytes() == b"whole"
