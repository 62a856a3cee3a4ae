"""What stands under a final name is whole, whatever fails; and a child process answers like a call."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import stat
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from edgelora.child import run_in_child
from edgelora.errors import CertificateError, EngineError, OutputError
from edgelora.files.atomic import (
    REPLACED,
    refuse_existing,
    remove,
    require_space,
    set_aside,
    share,
    staged,
    sweep,
    write_text,
)
from edgelora.peft.adapter import CONFIG, TENSORS
from edgelora.peft.adapter import write_folder as write_adapter_folder
from edgelora.progress import OnProgress, Progress


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` and its bytes: what must not change, and what must not be left behind."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_file(path: Path, *, overwrite: bool = True) -> None:
    with staged(path, overwrite=overwrite) as draft:
        draft.write_bytes(b"new")


def write_folder(path: Path, *, overwrite: bool = True) -> None:
    with staged(path, folder=True, overwrite=overwrite) as draft:
        (draft / "a").write_bytes(b"new")
        (draft / "deep").mkdir()
        (draft / "deep" / "b").write_bytes(b"new too")


# what is written, the tree before and the tree after
CASES = {
    "new file": (write_file, {}, {"out": b"new"}),
    "over a file": (write_file, {"out": b"old"}, {"out": b"new"}),
    "new folder": (write_folder, {}, {"out/a": b"new", "out/deep/b": b"new too"}),
    "over a folder": (
        write_folder, {"out/a": b"old", "out/gone": b"x"}, {"out/a": b"new", "out/deep/b": b"new too"},
    ),
}  # fmt: skip


def lay(folder: Path, files: dict[str, bytes]) -> None:
    for name, raw in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)


class Disk:
    """Counts the calls that make a file durable (fsync, rename, replace); the n-th raises, or all from then on."""

    def __init__(self, monkeypatch, *, fail_at=0, for_good=False, error=None) -> None:
        self.calls, self.fail_at, self.for_good = 0, fail_at, for_good
        self.error = error or OSError(28, "No space left on device")
        for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "replace")):
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, real):
        def call(*args):
            self.calls += 1
            if self.calls == self.fail_at or (self.for_good and self.calls > self.fail_at > 0):
                raise self.error
            return real(*args)

        return call


def n_calls(write, folder: Path) -> int:
    """How many such calls a write makes that goes well."""
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        write(folder / "out")
    return disk.calls


@pytest.mark.parametrize("case", CASES)
def test_written_whole(tmp_path, case):
    write, before, after = CASES[case]
    lay(tmp_path, before)
    write(tmp_path / "out")
    assert tree(tmp_path) == after
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("case", CASES)
def test_every_failure_of_the_disk_leaves_what_stood_there(tmp_path, case):
    write, before, after = CASES[case]
    lay(tmp_path / "good", before)
    for at in range(1, n_calls(write, tmp_path / "good") + 1):
        folder = tmp_path / str(at)
        folder.mkdir()
        lay(folder, before)
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, fail_at=at)
            left = after  # no error: then the new one stands there, whole
            try:
                write(folder / "out")
            except OutputError:
                left = before
        assert tree(folder) == left, f"call {at}"
        assert [p.name for p in folder.iterdir()] == ["out"] * bool(left), f"call {at}"


def test_every_file_and_both_folders_are_synced(tmp_path, monkeypatch):
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), real(fd)))
    out = tmp_path / "out"
    write_folder(out)
    assert synced == [p.stat().st_ino for p in (out / "a", out / "deep" / "b", out, tmp_path)]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("for_good", [False, True])
def test_the_old_folder_is_never_deleted_before_the_new_one_stands(tmp_path, monkeypatch, error, for_good):
    lay(tmp_path, {"out/a": b"old"})
    calls = n_calls(write_folder, tmp_path / "elsewhere")  # three files and folders, the rename, the folder above
    Disk(monkeypatch, fail_at=calls, for_good=for_good, error=error)  # moved aside already
    with pytest.raises((OutputError, KeyboardInterrupt)):
        write_folder(tmp_path / "out")
    assert b"old" in tree(tmp_path).values()


def test_nothing_stands_under_the_name_before_the_end(tmp_path):
    with staged(tmp_path / "out") as draft:
        draft.write_bytes(b"half")
        assert not (tmp_path / "out").exists()
        assert draft.parent.parent == tmp_path  # the same disk: the last step is a rename


def fail_within(path: Path, error: BaseException, folder: bool) -> None:
    with staged(path, folder=folder) as draft:
        (draft / "part" if folder else draft).write_bytes(b"half")
        raise error


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(28, "No space left")], ids=repr)
def test_a_failure_in_the_block_leaves_nothing(tmp_path, error, folder):
    with pytest.raises(OutputError if isinstance(error, OSError) else type(error)):
        fail_within(tmp_path / "out", error, folder)
    assert list(tmp_path.iterdir()) == []


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(OutputError, match="could not be written"), staged(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_missing_parent_is_made(tmp_path):
    write_text(tmp_path / "a" / "b" / "out", "text\n")
    assert tree(tmp_path) == {"a/b/out": b"text\n"}


def test_a_file_is_as_readable_as_any_other(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    write_file(tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_what_was_private_is_as_readable_as_any_other(tmp_path, umask):
    file = tmp_path / "out"
    file.touch(0o600)
    share(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_files_of_an_adapter_can_be_read_by_whoever_may(tmp_path, umask):
    tensors = {"q_proj.lora_A": np.zeros((2, 4), np.float32)}
    write_adapter_folder(tmp_path / "mine", {"peft_type": "LORA"}, tensors, None)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "mine").iterdir()}
    assert modes == dict.fromkeys((CONFIG, TENSORS), 0o666 & ~umask)


def test_text_is_utf8_with_unix_line_ends(tmp_path):
    write_text(tmp_path / "out", "ä\nb\r\n")
    assert (tmp_path / "out").read_bytes() == b"\xc3\xa4\nb\r\n"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_exists_is_refused_before_the_work(tmp_path, kind):
    path = tmp_path / "out"
    path.mkdir() if kind == "folder" else path.write_bytes(b"old")
    with pytest.raises(OutputError) as caught, staged(path):
        pytest.fail("the block ran")
    assert str(caught.value) == (
        f"{path}: this {kind} exists already\n"
        "  why: edgelora does not overwrite what it did not just make\n"
        "  fix: choose another name, delete it, or pass --overwrite"
    )
    refuse_existing(path, overwrite=True, folder=kind == "folder")


def test_a_file_where_a_folder_is_needed(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OutputError, match="nothing can be made here") as caught:
        write_file(tmp_path / "file" / "out")
    assert caught.value.fix == "choose a folder you may write to"
    assert tree(tmp_path) == {"file": b"old"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_one_may_not_write_to(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="nothing can be made here"):
        write_file(tmp_path / "out")
    tmp_path.chmod(0o700)


def test_a_name_that_the_disk_cannot_hold(tmp_path):
    path = tmp_path / ("x" * 300) / "out"
    for refuse in (refuse_existing, lambda path: require_space(path, 1, "the checkpoints")):
        with pytest.raises(OutputError) as caught:
            refuse(path)
        assert caught.value.what == f"{path}: nothing can be made here (File name too long)"
        assert caught.value.fix == "choose a folder you may write to, and a shorter name where it is too long"


@pytest.mark.parametrize("letter", ["x", "ß"])
def test_a_name_that_leaves_no_room_for_staging_is_refused_before_the_work(tmp_path, letter):
    most = 255 - len(".edgelora-.rejected-12345678")
    size = len(letter.encode())
    fits, long = (tmp_path / (letter * n) for n in (most // size, most // size + 1))
    refuse_existing(fits)
    write_file(fits)
    remove(set_aside(fits, fits))
    with pytest.raises(OutputError) as caught:
        refuse_existing(long)
    assert str(caught.value) == (
        f"{long}: a name of {len(os.fsencode(long.name))} bytes\n"
        f"  why: while it is written, longer ones stand beside it, which leaves it {most} bytes\n"
        "  fix: choose a shorter name"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_closed_to_us(tmp_path, monkeypatch):
    def closed(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", closed)  # root may enter everywhere
    with pytest.raises(OutputError) as caught:
        refuse_existing(tmp_path / "private" / "out")
    assert caught.value.what == f"{tmp_path / 'private' / 'out'}: nothing can be made here (Permission denied)"
    assert caught.value.why == "a folder on the way to it is closed to you, or a name is too long for the disk"


# -- what is removed, and what a killed process left --------------------------------------------------------------


@pytest.mark.parametrize("files", [{"out/a": b"old", "out/deep/b": b"x"}, {"out": b"old"}], ids=["folder", "file"])
def test_what_is_removed_is_whole_or_gone(tmp_path, files):
    lay(tmp_path / "good", files)
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        remove(tmp_path / "good" / "out")
    assert list((tmp_path / "good").iterdir()) == []
    for at in range(1, disk.calls + 1):
        folder = tmp_path / str(at)
        lay(folder, files)
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, fail_at=at, error=KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                remove(folder / "out")
        assert {name: raw for name, raw in tree(folder).items() if not name.startswith(".")} in (files, {})
        sweep(folder)
        assert tree(folder) in (files, {}), f"call {at}"


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path):
    lay(tmp_path, {"precious/a": b"mine"})
    (tmp_path / "out").symlink_to(tmp_path / "precious")
    remove(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]
    assert tree(tmp_path) == {"precious/a": b"mine"}


def killed(write, folder: Path, at: int) -> None:
    """As if the process had died before its `at`-th call: nothing is cleaned up."""
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, fail_at=at, for_good=True, error=KeyboardInterrupt())
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            write(folder / "out")


def after_each_kill(case, tmp_path):
    """(call, folder) for each call of `case` at which a process that wrote there was killed."""
    write, before, _ = CASES[case]
    lay(tmp_path / "good", before)
    for at in range(1, n_calls(write, tmp_path / "good") + 1):
        folder = tmp_path / str(at)
        folder.mkdir()
        lay(folder, before)
        killed(write, folder, at)
        yield at, folder


@pytest.mark.parametrize("case", CASES)
def test_what_a_killed_process_left_is_swept(tmp_path, case):
    _, before, after = CASES[case]
    for at, folder in after_each_kill(case, tmp_path):
        sweep(folder)
        assert tree(folder) in (before, after), f"call {at}"
        assert [p.name for p in folder.iterdir()] == ["out"] * bool(tree(folder)), f"call {at}"


@pytest.mark.parametrize("case", CASES)
def test_the_next_write_sweeps_what_a_killed_one_left(tmp_path, case):
    write, _, after = CASES[case]
    for at, folder in after_each_kill(case, tmp_path):
        write(folder / "out")
        assert tree(folder) == after, f"call {at}"
        assert [p.name for p in folder.iterdir()] == ["out"], f"call {at}"


def test_an_old_folder_that_a_killed_run_moved_aside_is_not_written_over(tmp_path):
    lay(tmp_path, {f".edgelora-out-abcdefgh/{REPLACED}/a": b"old", ".edgelora-out-abcdefgh/out/a": b"half"})
    with pytest.raises(OutputError, match="exists already"):
        write_folder(tmp_path / "out", overwrite=False)
    assert tree(tmp_path) == {"out/a": b"old"}


@pytest.mark.parametrize("folder", [False, True])
def test_what_is_true_of_the_old_one_only_is_gone_before_the_new_one_stands(tmp_path, folder):
    def write(out: Path) -> None:
        with staged(out, folder=folder, overwrite=True, stale=out.with_name("card")) as draft:
            (draft / "a" if folder else draft).write_bytes(b"new")

    one = "out/a" if folder else "out"
    before, after = {one: b"old", "card": b"of the old"}, {one: b"new"}
    lay(tmp_path / "good", before)
    calls = n_calls(write, tmp_path / "good")
    assert tree(tmp_path / "good") == after
    for at in range(1, calls + 1):
        broken, dead = tmp_path / f"broken-{at}", tmp_path / f"dead-{at}"
        lay(broken, before)
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, fail_at=at)
            told = False
            try:
                write(broken / "out")
            except OutputError:
                told = True
        assert tree(broken) == (before if told else after), f"call {at}"
        lay(dead, before)
        killed(write, dead, at)
        sweep(dead)
        left = tree(dead)
        assert left in (before, after, {one: b"old"}), f"call {at}"


@pytest.mark.parametrize("before", ["open", "flock"])
def test_a_room_that_another_process_sweeps_as_it_is_made_is_made_again(tmp_path, monkeypatch, before):
    """Two processes write one name at once: each sweeps what the other has made and not locked yet."""
    module, swept = {"open": os, "flock": fcntl}[before], []
    call = getattr(module, before)

    def late(*arguments, **options):
        rooms = [path for path in tmp_path.iterdir() if path.name.startswith(".edgelora-out-")]
        if rooms and not swept:
            swept.append(rooms[0].rmdir())
        return call(*arguments, **options)

    monkeypatch.setattr(module, before, late)
    with staged(tmp_path / "out") as draft:
        draft.write_bytes(b"x")
    assert len(swept) == 1
    assert tree(tmp_path) == {"out": b"x"}


def test_only_what_staging_left_is_swept(tmp_path):
    room = {".edgelora-out-abcd_123/out/a": b"half"}
    kept = {
        "out/a": b"x", ".edgelora-out": b"x", ".edgelora-out-ABCDEFGH": b"x", ".edgelora": b"x",
        ".edgelora-other-abcd1234/other": b"half", ".edgelora-out-2-abcd1234/out-2": b"half",
    }  # fmt: skip
    lay(tmp_path, room | kept)
    sweep(tmp_path, "out")
    assert tree(tmp_path) == kept
    sweep(tmp_path)
    assert tree(tmp_path) == {name: raw for name, raw in kept.items() if raw != b"half"}


def test_what_stands_there_is_not_put_back_over(tmp_path):
    lay(tmp_path, {"out": b"new", f".edgelora-out-abcdefgh/{REPLACED}": b"old", ".edgelora-out-abcdefgh/out": b"x"})
    sweep(tmp_path)
    assert tree(tmp_path) == {"out": b"new"}


def test_a_room_that_is_a_link_leads_nowhere(tmp_path):
    lay(tmp_path, {f"precious/{REPLACED}": b"mine", "precious/out": b"mine too"})
    (tmp_path / ".edgelora-out-abcdefgh").symlink_to(tmp_path / "precious")
    sweep(tmp_path)
    assert tree(tmp_path) == {f"precious/{REPLACED}": b"mine", "precious/out": b"mine too"}
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_a_folder_that_is_not_there_needs_no_sweeping(tmp_path):
    sweep(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, 1_500_000))
    require_space(tmp_path / "run", 1_500_000, "the checkpoints")
    with pytest.raises(OutputError) as caught:
        require_space(tmp_path / "run", 3_600_000, "the checkpoints")
    assert str(caught.value) == (
        f"{tmp_path / 'run'}: the checkpoints need 3,600,000 bytes, and 1,500,000 are free\n"
        "  why: the disk would be full before the end\n"
        "  fix: free 2,100,000 bytes or more there, or choose a folder on another disk"
    )


def test_the_space_is_that_of_the_disk_under_a_folder_to_come(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    require_space(tmp_path / "a" / "b", free // 2, "the checkpoints")
    with pytest.raises(OutputError):
        require_space(tmp_path / "a" / "b", 1 << 60, "the checkpoints")
    assert list(tmp_path.iterdir()) == []


# -- a child process: the functions below run in it ---------------------------------------------------------------


def add(a: int, b: int, on_progress: OnProgress) -> int:
    for step in range(2):
        on_progress(Progress("add", step + 1, 2, loss=0.5))
    return a + b


def refuse(what: str, _: OnProgress) -> None:
    raise CertificateError(what, "the reason", "the way out")


def die(number: int, _: OnProgress) -> None:
    os.kill(os.getpid(), number)


class Rare(UserWarning):
    """A warning that no other process need know of."""


def warn_of(what: str, on_progress: OnProgress) -> int:
    warnings.warn(what, Rare, stacklevel=1)
    return add(2, 3, on_progress)


def own_id(_: OnProgress) -> int:
    return os.getpid()


def surroundings(names: tuple[str, ...], _: OnProgress) -> tuple[list[str | None], bool]:
    """These variables, and whether Ctrl-C is blocked."""
    return [os.environ.get(name) for name in names], signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def begins_with(_: OnProgress) -> tuple[bool, int]:
    """Whether torch is there already, and how many threads."""
    return "torch" in sys.modules, len(list(Path("/proc/self/task").iterdir()))


def either(test):
    """A child in an interpreter of its own, and one that is forked."""
    return pytest.mark.usefixtures("spawned")(pytest.mark.parametrize("with_torch", [False, True], ids=str)(test))


@either
def test_a_child_returns_and_tells_its_progress(with_torch):
    heard: list[Progress] = []
    assert run_in_child(add, 2, 3, with_torch=with_torch, on_progress=heard.append) == 5
    assert heard == [Progress("add", 1, 2, loss=0.5), Progress("add", 2, 2, loss=0.5)]


@either
def test_what_python_warns_of_in_a_child_is_shown_as_a_warning_of_its_parents(with_torch, capfd):
    with pytest.warns(UserWarning, match="soon gone") as shown:
        assert run_in_child(warn_of, "soon gone", with_torch=with_torch) == 5
    (warned,) = shown
    line = warn_of.__code__.co_firstlineno + 1
    assert (warned.category, warned.filename, warned.lineno) == (UserWarning, __file__, line)
    assert capfd.readouterr().err == ""


@either
def test_a_child_is_another_process_each_time(with_torch):
    assert len({os.getpid(), *(run_in_child(own_id, with_torch=with_torch) for _ in range(2))}) == 3


@either
def test_a_childs_error_comes_back_as_it_was(with_torch):
    with pytest.raises(CertificateError) as caught:
        run_in_child(refuse, "what happened", with_torch=with_torch)
    assert type(caught.value) is CertificateError
    assert str(caught.value) == "what happened\n  why: the reason\n  fix: the way out"
    assert caught.value.exit_code == 3


@either
def test_a_killed_child_is_an_error_that_names_the_signal(with_torch):
    with pytest.raises(EngineError) as caught:
        run_in_child(die, signal.SIGKILL, with_torch=with_torch)
    assert caught.value.what == "the child process of die ended without an answer (SIGKILL)"
    assert caught.value.why
    assert caught.value.fix


@either
def test_a_child_has_the_environment_of_this_moment_and_hears_ctrl_c(with_torch, monkeypatch):
    monkeypatch.setenv("EDGELORA_TEST", "now")
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    asked = "EDGELORA_TEST", "PYTHONSAFEPATH"
    assert run_in_child(surroundings, asked, with_torch=with_torch) == (["now", None], False)
    monkeypatch.delenv("EDGELORA_TEST")
    assert run_in_child(surroundings, asked, with_torch=with_torch) == ([None, None], False)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each child imports torch itself")
@pytest.mark.usefixtures("spawned")
def test_a_child_with_torch_has_it_when_it_begins_and_one_thread():
    assert run_in_child(begins_with, with_torch=True) == (True, 1)  # more would be lost in the fork
    assert not run_in_child(begins_with)[0]


def test_where_nothing_can_be_forked_it_is_a_process_of_its_own(monkeypatch):
    def refused() -> None:
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr("multiprocessing.forkserver.ensure_running", refused)
    assert run_in_child(add, 2, 3, with_torch=True) == 5


def peak(_):
    from edgelora.device import peak_memory_bytes

    return peak_memory_bytes()


@pytest.mark.usefixtures("spawned")
def test_a_child_does_not_inherit_its_parents_peak():
    ballast = bytearray(600 << 20)
    ballast[:: 1 << 12] = b"x" * len(ballast[:: 1 << 12])  # touch every page
    assert run_in_child(peak) < 300 << 20
