"""A checkpoint comes back to the bit, or is known to be damaged; a kill or a full disk costs none but the newest."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from test_atomic import Disk, tree

from edgelora.errors import FileFormatError, OutputError
from edgelora.files import manifest
from edgelora.files.atomic import sweep
from edgelora.files.manifest import MANIFEST
from edgelora.training import checkpoint
from edgelora.training.checkpoint import Snapshot, checkpoint_path, read_checkpoint, read_latest, write_checkpoint

STATE, TENSORS = checkpoint.STATE, checkpoint.TENSORS
DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64,
]  # fmt: skip


def snapshot(step: int, micro: int = 0, **facts: object) -> Snapshot:
    """Small, and another one at each moment."""
    draw = torch.Generator().manual_seed(1000 * step + micro)
    tensors = {
        "parameter.q_proj.lora_A": torch.randn(2, 3, generator=draw),
        "optimizer.step": torch.tensor(float(step)),
        "optimizer.exp_avg_8bit": torch.randint(256, (5,), dtype=torch.uint8, generator=draw),
        "rng.torch": draw.get_state()[:16],
    }
    return Snapshot(step, micro, tensors, {"losses": [float(step).hex()], "best": None, **facts})


def same(a: Snapshot | None, b: Snapshot) -> bool:
    """To the bit: NaN payloads and the signs of zeros too."""
    return a is not None and told(a) == told(b)


def told(one: Snapshot) -> tuple[object, ...]:
    tensors = {
        n: (t.dtype, t.shape, t.contiguous().view(-1).view(torch.uint8).tolist()) for n, t in one.tensors.items()
    }
    return one.step, one.micro, tensors, json.dumps(one.facts, sort_keys=True)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def latest(folder: Path) -> Snapshot | None:
    """The newest checkpoint, where none is damaged."""
    return read_latest(folder, pytest.fail)


# -- there and back -----------------------------------------------------------------------------------------------


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 4), max_size=3))
    n_bytes = torch.zeros(shape).numel() * dtype.itemsize
    raw = bytearray(draw(st.binary(min_size=n_bytes, max_size=n_bytes)))
    if dtype == torch.bool:
        raw = bytearray(byte & 1 for byte in raw)
    return torch.frombuffer(raw, dtype=dtype).view(shape) if raw else torch.zeros(shape, dtype=dtype)


printable = st.text(st.characters(blacklist_categories=("C", "Z")), min_size=1, max_size=30)
texts = st.text(st.characters(blacklist_categories=("Cs",)))
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
facts = st.recursive(
    st.none() | st.booleans() | numbers | texts, lambda x: st.lists(x) | st.dictionaries(texts, x), max_leaves=8
)
snapshots = st.builds(
    Snapshot,
    step=st.integers(0, 10**9),
    micro=st.integers(0, 10**6),
    tensors=st.dictionaries(printable, tensors(), max_size=6),
    facts=st.dictionaries(texts, facts, max_size=4),
)


@settings(deadline=None, max_examples=60)
@given(snapshots)
def test_a_snapshot_comes_back_to_the_bit(tmp_path_factory, one):
    folder = tmp_path_factory.mktemp("checkpoints")
    path = write_checkpoint(folder, one, keep_last=1, best=None)
    assert same(read_checkpoint(path), one)
    assert load_file(path / TENSORS).keys() == one.tensors.keys()  # the library is the oracle of the format


def test_views_and_names_of_one_memory_come_back(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    parts = {"whole": whole, "again": whole, "row": whole[1], "turned": whole.T, "needs grad": whole.requires_grad_()}
    one = Snapshot(1, 0, parts, {})
    assert same(read_checkpoint(write_checkpoint(tmp_path, one, keep_last=1, best=None)), one)


def test_what_was_read_does_not_hang_on_the_file(tmp_path):
    path = write_checkpoint(tmp_path, snapshot(1), keep_last=1, best=None)
    read = read_checkpoint(path)
    (path / TENSORS).write_bytes(bytes((path / TENSORS).stat().st_size))  # in place: a mapped tensor would change
    assert same(read, snapshot(1))


def test_exact_bytes(tmp_path):
    one = Snapshot(42, 3, {"a": torch.tensor([1, 2], dtype=torch.uint8)}, {"loss": (0.1).hex()})
    path = write_checkpoint(tmp_path, one, keep_last=1, best=None)
    assert path == tmp_path / "step-00000042-00003"
    assert names(path) == [MANIFEST, STATE, TENSORS]
    state = b'{"step": 42, "micro": 3, "facts": {"loss": "0x1.999999999999ap-4"}}\n'
    assert (path / STATE).read_bytes() == state
    with safe_open(path / TENSORS, "pt") as file:
        assert file.metadata() is None
    raw = (path / TENSORS).read_bytes()
    files = {STATE: state, TENSORS: raw}
    wanted = {n: {"sha256": hashlib.sha256(r).hexdigest(), "size_bytes": len(r)} for n, r in files.items()}
    assert (path / MANIFEST).read_text() == json.dumps({"files": wanted}, indent=2) + "\n"


# -- which are kept -----------------------------------------------------------------------------------------------


def test_its_files_can_be_read_by_whoever_may_read_the_others(tmp_path):
    (tmp_path / "plain").touch()
    path = write_checkpoint(tmp_path, snapshot(1), keep_last=1, best=None)
    assert {file.stat().st_mode for file in path.iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_names_sort_in_the_order_of_the_moments():
    moments = [(0, 0), (1, 0), (1, 1), (1, 10), (2, 0), (10, 0), (10**8 - 1, 99999)]
    paths = [checkpoint_path(Path(), *moment) for moment in moments]
    assert paths == sorted(paths)
    assert paths[:3] == [Path("step-00000000"), Path("step-00000001"), Path("step-00000001-00001")]


@pytest.mark.parametrize(
    ("keep_last", "best", "left"),
    [(1, None, [5]), (2, None, [4, 5]), (2, 1, [1, 4, 5]), (1, 5, [5]), (9, 9, [1, 2, 3, 4, 5])],
)
def test_the_last_ones_and_the_best_are_kept(tmp_path, keep_last, best, left):
    for step in range(1, 6):
        write_checkpoint(tmp_path, snapshot(step), keep_last=keep_last, best=best)
    assert names(tmp_path) == [f"step-{step:08}" for step in left]
    assert same(latest(tmp_path), snapshot(5))


def test_one_within_a_step_comes_after_that_step(tmp_path):
    for moment in ((3, 0), (3, 2)):
        write_checkpoint(tmp_path, snapshot(*moment), keep_last=2, best=None)
    assert same(latest(tmp_path), snapshot(3, 2))
    write_checkpoint(tmp_path, snapshot(4), keep_last=2, best=None)
    assert names(tmp_path) == ["step-00000003-00002", "step-00000004"]


def test_what_a_resumed_run_passed_over_takes_nobodys_place(tmp_path):
    for step in (2, 4, 6):
        write_checkpoint(tmp_path, snapshot(step), keep_last=3, best=None)
    for step in (4, 6):
        (checkpoint_path(tmp_path, step) / STATE).unlink()
    write_checkpoint(tmp_path, snapshot(4), keep_last=2, best=None)  # the run went on from step 2
    assert names(tmp_path) == ["step-00000002", "step-00000004"]
    assert same(latest(tmp_path), snapshot(4))


def test_other_things_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-1").mkdir()
    for step in (1, 2):
        write_checkpoint(tmp_path, snapshot(step), keep_last=1, best=None)
    assert names(tmp_path) == ["notes.txt", "step-00000002", "step-1"]


# -- damage -------------------------------------------------------------------------------------------------------


def test_no_folder_and_an_empty_one_hold_none(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "none") is None


@pytest.mark.parametrize("file", [STATE, TENSORS, MANIFEST])
def test_every_flipped_byte_is_found(tmp_path, file):
    path = write_checkpoint(tmp_path, snapshot(1), keep_last=1, best=None)
    good = (path / file).read_bytes()
    for at in range(len(good)):
        for mask in (0x01, 0x20, 0xFF):
            bad = bytearray(good)
            bad[at] ^= mask
            (path / file).write_bytes(bad)
            with pytest.raises(FileFormatError):
                read_checkpoint(path)
    (path / file).write_bytes(good)
    assert same(read_checkpoint(path), snapshot(1))


@pytest.mark.parametrize("file", [STATE, TENSORS, MANIFEST])
def test_every_torn_end_is_found(tmp_path, file):
    path = write_checkpoint(tmp_path, snapshot(1), keep_last=1, best=None)
    good = (path / file).read_bytes()
    for bad in (*(good[:n] for n in range(len(good))), good + b"\0", good + b"\n", good + good):
        (path / file).write_bytes(bad)
        with pytest.raises(FileFormatError):
            read_checkpoint(path)


def listed(path: Path, **files: object) -> None:
    """Make the manifest say `files`."""
    (path / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")


def relisted(path: Path) -> None:
    """A manifest that fits whatever stands there now: what follows is not the manifest's to find."""
    (path / MANIFEST).unlink()
    manifest.write_manifest(path)


def linked(path: Path) -> None:
    (path / STATE).rename(path.parent / "elsewhere.json")
    (path / STATE).symlink_to(path.parent / "elsewhere.json")


def restated(path: Path, text: str) -> None:
    (path / STATE).write_text(text)
    relisted(path)


def odd_dtype(path: Path) -> None:
    head = b'{"a":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    (path / TENSORS).write_bytes(len(head).to_bytes(8, "little") + head + b"abc")
    relisted(path)


GOOD = {"sha256": "0" * 64, "size_bytes": 1}
NOT_A_LIST = "manifest.json is no list of plain files, their sizes and SHA-256"
DAMAGE = {
    "a file missing": (lambda p: (p / STATE).unlink(), "state.json is missing"),
    "a file too many": (lambda p: (p / "x\n").touch(), r"'x\\n' does not belong here"),
    "a folder too many": (lambda p: (p / "deep").mkdir(), "'deep' does not belong here"),
    "many files too many": (
        lambda p: [(p / f"{i:02}").touch() for i in range(99)], "'07' does not belong here and 91 more",
    ),
    "torn": (lambda p: os.truncate(p / TENSORS, 9), r"state.safetensors has 9 bytes instead of \d+"),
    "two faults": (
        lambda p: [(p / STATE).unlink(), (p / "x").touch()], "state.json is missing; 'x' does not belong here",
    ),
    "a link": (linked, "state.json is no regular file"),
    "a pipe": (lambda p: [(p / STATE).unlink(), os.mkfifo(p / STATE)], "state.json is no regular file"),
    "no manifest": (lambda p: (p / MANIFEST).unlink(), r"it cannot be read \(No such file or directory\)"),
    "an empty manifest": (lambda p: listed(p), NOT_A_LIST),
    "a list for a manifest": (lambda p: (p / MANIFEST).write_text("[]"), "it holds no JSON object"),
    "garbage for a manifest": (lambda p: (p / MANIFEST).write_bytes(b"\xff\0"), "it is not JSON"),
    "a huge manifest": (lambda p: os.truncate(p / MANIFEST, 1 << 40), "it is longer than 65536 bytes"),
    "a manifest of elsewhere": (lambda p: listed(p, **{"../secret": GOOD}), NOT_A_LIST),
    "a manifest of everywhere": (lambda p: listed(p, **{"/etc/passwd": GOOD}), NOT_A_LIST),
    "a manifest of a hidden file": (lambda p: listed(p, **{".x": GOOD}), NOT_A_LIST),
    "a manifest that names itself": (lambda p: listed(p, **{MANIFEST: GOOD}), "manifest.json is missing"),
    "a negative size": (lambda p: listed(p, a=GOOD | {"size_bytes": -1}), NOT_A_LIST),
    "a size in words": (lambda p: listed(p, a=GOOD | {"size_bytes": "1"}), NOT_A_LIST),
    "half a hash": (lambda p: listed(p, a=GOOD | {"sha256": "00"}), NOT_A_LIST),
    "more said": (lambda p: listed(p, a=GOOD | {"mode": 7}), NOT_A_LIST),
    "another state": (lambda p: restated(p, '{"step": 2, "micro": 0, "facts": {}}'), "it is that of step 2, renamed"),
    "no state": (lambda p: restated(p, "{}"), r"it was not written by edgelora \(ValidationError\)"),
    "a step that is none": (
        lambda p: restated(p, '{"step": true, "micro": 0, "facts": {}}'), "it was not written by edgelora",
    ),
    "no tensors": (lambda p: [(p / TENSORS).write_bytes(b""), relisted(p)], "shorter than the header"),
    "tensors that are not torch's": (odd_dtype, "it was not written by edgelora"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_and_the_one_before_is_used(tmp_path, case):
    damage, why = DAMAGE[case]
    write_checkpoint(tmp_path, snapshot(0), keep_last=2, best=None)
    path, heard = write_checkpoint(tmp_path, snapshot(1), keep_last=2, best=None), []
    damage(path)
    with pytest.raises(FileFormatError, match=why):
        read_checkpoint(path)
    assert same(read_latest(tmp_path, heard.append), snapshot(0))
    assert len(heard) == 1
    assert heard[0].startswith("step-00000001: this checkpoint is damaged (")
    assert heard[0].endswith("; step-00000000 is used instead")


def test_a_file_or_link_in_a_checkpoints_place(tmp_path):
    write_checkpoint(tmp_path / "a", snapshot(1), keep_last=1, best=None)
    (tmp_path / "a" / "step-00000002").write_text("no folder")
    (tmp_path / "a" / "step-00000003").symlink_to(tmp_path / "a" / "step-00000001")
    heard: list[str] = []
    assert same(read_latest(tmp_path / "a", heard.append), snapshot(1))
    assert [h.partition(":")[0] for h in heard] == ["step-00000003", "step-00000002"]


def test_none_is_left(tmp_path):
    path, heard = write_checkpoint(tmp_path, snapshot(1), keep_last=1, best=None), []
    (path / STATE).unlink()
    assert read_latest(tmp_path, heard.append) is None
    assert heard == ["step-00000001: this checkpoint is damaged (state.json is missing); none is left"]


def test_a_sector_that_cannot_be_read(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path, snapshot(1), keep_last=1, best=None)

    def broken(_: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(manifest, "sha256_file", broken)
    with pytest.raises(FileFormatError, match=r"state.json cannot be read \(Input/output error\)"):
        read_checkpoint(path)


def test_the_three_lines_of_a_damaged_one(tmp_path):
    path = write_checkpoint(tmp_path, snapshot(1), keep_last=1, best=None)
    raw = bytearray((path / STATE).read_bytes())
    raw[2] ^= 1
    (path / STATE).write_bytes(raw)
    with pytest.raises(FileFormatError) as caught:
        read_checkpoint(path)
    assert str(caught.value) == (
        "step-00000001: this checkpoint is damaged\n"
        "  why: state.json was altered\n"
        f"  fix: delete {path}: the one before it is used then"
    )


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(FileFormatError, match="no folder that can be read"):
        latest(tmp_path / "checkpoints")


# -- a disk that refuses, and a process that dies ------------------------------------------------------------------


def three(folder: Path) -> None:
    """The third of three checkpoints, of which two are kept."""
    write_checkpoint(folder, snapshot(3), keep_last=2, best=None)


def two_before(folder: Path) -> dict[str, bytes]:
    for step in (1, 2):
        write_checkpoint(folder, snapshot(step), keep_last=2, best=None)
    return tree(folder)


def test_every_failure_of_the_disk_leaves_the_one_before(tmp_path):
    two_before(tmp_path / "good")
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        three(tmp_path / "good")
    after = tree(tmp_path / "good")
    failed = 0
    for at in range(1, disk.calls + 1):
        folder = tmp_path / str(at)
        before = two_before(folder)
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, fail_at=at)
            try:
                three(folder)
            except OutputError:
                failed += 1
                assert tree(folder) == before, f"call {at}"
                continue
        assert same(latest(folder), snapshot(3)), f"call {at}"
        three(folder)
        assert tree(folder) == after, f"call {at}"  # what could not be removed then is removed by the next write
    assert failed == 5  # three files, their folder, the rename; not the folder above, nor what is removed


def test_a_disk_that_is_full_at_any_byte_leaves_the_one_before(tmp_path):
    before = two_before(tmp_path)
    largest = max(len(raw) for raw in before.values())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (*range(0, largest, 16), largest - 1):  # the kernel itself refuses a longer file
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OutputError, match="could not be written") as caught:
                three(tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.why
        assert tree(tmp_path) == before
        assert names(tmp_path) == ["step-00000001", "step-00000002"]
    three(tmp_path)
    assert same(latest(tmp_path), snapshot(3))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_no_space_in_the_middle_of_the_state(tmp_path, monkeypatch):
    before, real = two_before(tmp_path), Path.write_text

    def full(path: Path, text: str, **how: str) -> int:
        path.symlink_to("/dev/full")
        return real(path, text, **how)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match="No space left on device"):
        three(tmp_path)
    assert tree(tmp_path) == before


DIE = """
import os, shutil, sys, warnings
from pathlib import Path

sys.path.insert(0, sys.argv[1])
warnings.simplefilter("ignore")  # of threads that fork leaves behind
from test_checkpoints import three, two_before

def dying(real, at, count):
    def call(*args, **how):
        count[0] += 1
        if count[0] == at:
            os._exit(9)
        return real(*args, **how)
    return call

folder, at = Path(sys.argv[2]), 0
while True:
    at += 1
    two_before(folder / str(at))
    child = os.fork()
    if not child:
        count = [0]
        for owner in (os, Path):
            for name in {"fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "write_bytes"} & set(dir(owner)):
                setattr(owner, name, dying(getattr(owner, name), at, count))
        three(folder / str(at))
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
"""


def test_a_death_at_any_call_leaves_whole_checkpoints_and_is_swept(tmp_path):
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", DIE, str(tests), str(tmp_path)], cwd=tests.parent, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    deaths = list(tmp_path.iterdir())
    assert len(deaths) > 15
    newest = []
    for folder in deaths:
        sweep(folder)
        for name in names(folder):  # each checkpoint is whole or not there, and nothing else is
            found = read_checkpoint(folder / name)
            assert same(found, snapshot(found.step))
        newest.append(found.step)
    assert set(newest) == {2, 3}
