"""The store: names come and go, a content stands once and whole, whoever works on it at once and wherever one dies."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import random
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_export import make_adapter
from test_preflight import pair, write_foreign

from converters.adapter_to_gguf import write_adapter_gguf
from edgelora.base.model import open_base
from edgelora.errors import AdapterError, ConfigError, FileFormatError, OutputError
from edgelora.files.contract import CERTIFICATE_KEY
from edgelora.files.reserved import fill_reserved
from runtime import store as subject
from runtime.preflight import preflight
from runtime.store import Store


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    """Three adapters that edgelora exported; their paths by name."""
    folder, base = tmp_path_factory.mktemp("adapters"), open_base(tiny.path)
    for seed, name in enumerate(("one", "two", "three")):
        write_adapter_gguf(folder / f"{name}.gguf", make_adapter(base, seed=seed), base, name)
    return {name: folder / f"{name}.gguf" for name in ("one", "two", "three")}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "adapters")


def blobs(store):
    return sorted(path.stem for path in (store.folder / "blobs").iterdir())


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def require_sound(store):
    """Every name has its content, whole; every content has a name; nothing else lies about."""
    stored = store.all()
    assert all(digest(adapter.path) == adapter.about.digest for adapter in stored)
    assert blobs(store) == sorted({adapter.about.digest for adapter in stored})
    return {adapter.name: adapter.about.digest for adapter in stored}


def test_what_is_stored_is_the_file_and_what_it_says_of_itself(store, files, tiny):
    fill_reserved(files["one"], CERTIFICATE_KEY, json.dumps({"passed": True, "kl_mean": 1e-6}))
    base = open_base(tiny.path)
    added = store.add("home", files["one"])
    assert added == store.get("home") == store.all()[0]
    assert added.path.read_bytes() == files["one"].read_bytes()
    assert added.path == store.folder / "blobs" / f"{digest(files['one'])}.gguf"
    assert not os.access(added.path, os.W_OK) or os.geteuid() == 0
    assert added.path.stat().st_mode & 0o222 == 0
    about, contract = added.about, preflight(added.path, base, cache=store.folder / "cache").contract
    assert (about.digest, about.size_bytes) == (digest(files["one"]), files["one"].stat().st_size)
    assert (
        (about.base, about.base_quant)
        == (base.fingerprint.short, "F32")
        == (contract.base.short, contract.base_file.quant)
    )
    assert (about.method, about.ranks, about.system) == (contract.method, (4,), contract.system)
    assert about.scores["certificate"] == {"passed": True, "kl_mean": 1e-6}
    assert about.scores.get("evaluation", {}) == contract.evaluation
    assert added.added.endswith("+00:00")


def test_an_adapter_made_elsewhere_is_stored_and_says_less(store, tmp_path):
    tensors = pair(rank=8) | pair("blk.1.attn_q.weight", rank=2)
    about = store.add("f", write_foreign(tmp_path / "f.gguf", tensors)).about
    assert (about.method, about.ranks, about.base, about.base_name, about.base_quant) == (
        "lora",
        (2, 8),
        None,
        None,
        None,
    )
    assert (about.system, about.single_turn, about.scores) == (None, False, {})


def test_the_same_content_stands_once_until_its_last_name_goes(store, files):
    store.add("a", files["one"])
    store.add("b", files["one"])
    store.add("b", files["one"])  # again: nothing changes
    assert blobs(store) == [digest(files["one"])]
    store.remove("a")
    assert require_sound(store) == {"b": digest(files["one"])}
    store.remove("b")
    assert blobs(store) == []
    assert store.all() == []


def test_a_name_is_not_given_away_unasked(store, files):
    store.add("a", files["one"])
    with pytest.raises(OutputError) as fault:
        store.add("a", files["two"])
    assert str(fault.value).splitlines() == [
        "the name a is taken",
        f"  why: it stands for another adapter (sha256 {digest(files['one'])[:12]}…)",
        "  fix: choose another name, remove that one, or pass --overwrite",
    ]
    assert require_sound(store) == {"a": digest(files["one"])}
    store.add("a", files["two"], overwrite=True)
    assert require_sound(store) == {"a": digest(files["two"])}


@pytest.mark.parametrize("name", ["", "A", "-a", ".a", "a/b", "a b", "ä", "a" * 65, "../a", "a\n", "con\0"])
def test_impossible_names_are_refused(store, files, name):
    with pytest.raises(ConfigError, match="no name for an adapter"):
        store.add(name, files["one"])
    assert not store.folder.exists()


@pytest.mark.parametrize("name", ["a", "0", "a" * 64, "poet-2", "a.b_c-d", "x..", "a.gguf"])
def test_possible_names_are_taken(store, files, name):
    assert store.add(name, files["one"]).name == name
    assert store.resolve(name) == store.get(name).path


def test_a_file_or_a_name_is_resolved(store, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stored = store.add("home", files["one"])
    assert store.resolve("home") == stored.path
    assert store.resolve(str(files["two"])) == files["two"]
    Path("home").mkdir()
    assert store.resolve("home") == stored.path  # a folder is no adapter that llama.cpp loads
    Path("home").rmdir()
    Path("home").write_bytes(b"")
    assert store.resolve("home") == Path("home")
    assert store.resolve("not/there.gguf") == Path("not/there.gguf")
    with pytest.raises(AdapterError) as fault:
        store.resolve("hoem")
    assert str(fault.value).splitlines() == [
        "hoem: neither a file nor the name of a stored adapter",
        "  why: stored are: home",
        "  fix: add it first: edgelora adapters add FILE --name NAME",
    ]


def test_an_empty_store_is_not_made_by_looking(store):
    assert store.all() == []
    for look in (store.get, store.remove, store.resolve):
        with pytest.raises(AdapterError, match="a"):
            look("a")
    assert not store.folder.exists()


def test_what_is_no_sound_adapter_is_not_stored(store, files, tmp_path):
    whole = files["one"].read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:-100])
    (tmp_path / "folder").mkdir()
    write_foreign(tmp_path / "nan.gguf", pair(value=np.nan))
    write_foreign(tmp_path / "int.gguf", pair(dtype=np.int32, value=1))
    write_foreign(tmp_path / "odd.gguf", {**pair(), "blk.0.attn_q.weight.lora_b": np.zeros((256, 5), np.float32)})
    faults = {
        "cut.gguf": "cut short", "folder": "export it first", "nan.gguf": "NaN", "int.gguf": "I32", "odd.gguf": "r 5",
        "none.gguf": "No such file",
    }  # fmt: skip
    for name, words in faults.items():
        with pytest.raises((AdapterError, FileFormatError)) as fault:
            store.add("x", tmp_path / name)
        assert words in str(fault.value), name
    assert not store.folder.exists()


def test_a_damaged_content_is_healed_by_adding_it_again(store, files):
    stored = store.add("a", files["one"])
    stored.path.chmod(0o644)
    with stored.path.open("r+b") as f:
        f.seek(-1, 2)
        f.write(b"\xff")
    store.add("b", files["one"])
    require_sound(store)


# -- several at once ----------------------------------------------------------------------------------------------

CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def _churn(folder, paths, seed):
    """Add and remove under few names, as wildly as may be; what others do at the same time is no error."""
    store, draw = Store(folder), random.Random(seed)
    for _ in range(25):
        name, path = draw.choice("abc"), draw.choice(paths)
        try:
            if draw.random() < 0.6:
                store.add(name, path, overwrite=True)
            else:
                store.remove(name)
        except AdapterError:
            pass  # another process has taken the name away


def test_processes_may_add_and_remove_at_once(store, files):
    """With few names and contents, every add meets removals of its own content between its two steps."""
    processes = [CONTEXT.Process(target=_churn, args=(store.folder, list(files.values()), i)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0] * 4
    require_sound(store)
    for adapter in store.all():
        store.remove(adapter.name)
    assert blobs(store) == []


def test_a_content_that_is_removed_in_between_is_published_again(store, files, monkeypatch):
    """Somebody removes the content behind `_publish`, and it is published again."""
    publish, times = Store._publish, []

    def undone(self, digest, content):
        publish(self, digest, content)
        times.append(digest)
        if len(times) == 1:
            self._blob(digest).unlink()

    monkeypatch.setattr(Store, "_publish", undone)
    store.add("a", files["one"])
    assert len(times) == 2
    require_sound(store)


# -- a crash anywhere ---------------------------------------------------------------------------------------------

CRASH = """
import os, sqlite3, sys
from pathlib import Path
from runtime.store import Store
root, action, one, two, three = sys.argv[1:]
seen = 0
def dying(call, at):
    def step(*arguments, **options):
        global seen
        seen += 1
        if seen == at:
            os.kill(os.getpid(), 9)
        return call(*arguments, **options)
    return step
def act(store, at):
    for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "chmod"):
        setattr(os, name, dying(getattr(os, name), at))
    class Connection(sqlite3.Connection):
        def execute(self, *arguments):
            return dying(super().execute, at)(*arguments)
    connect = sqlite3.connect
    sqlite3.connect = lambda *a, **k: connect(*a, factory=Connection, **k)
    if action == "remove":
        store.remove("new")
    else:
        store.add("new", Path(one), overwrite=True)
for at in range(1, 1000):
    store = Store(Path(root, str(at)))
    store.add("old", Path(three))
    if action != "add":
        store.add("new", Path(two))
    child = os.fork()
    if not child:
        act(store, at)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status):
        sys.exit(f"{at} {os.WEXITSTATUS(status)}")
    assert os.WTERMSIG(status) == 9
"""


@pytest.mark.parametrize("action", ["add", "replace", "remove"])
def test_a_kill_at_any_step_leaves_nothing_wrong(tmp_path, files, action):
    """Killed before each call that changes the disk and each statement; then as it was or as it should be, and the
    next change removes what was left over."""
    paths = [str(files[name]) for name in ("one", "two", "three")]
    words = [sys.executable, "-P", "-c", CRASH, str(tmp_path), action, *paths]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=100)
    steps, code = map(int, done.stderr.split())
    assert code == 0
    assert steps > 10
    one, two, three = (digest(Path(path)) for path in paths)
    before, after = {"add": (None, one), "replace": (two, one), "remove": (two, None)}[action]
    ends = []
    for at in range(1, steps + 1):
        store = Store(tmp_path / str(at))
        found = {adapter.name: adapter.about.digest for adapter in store.all()}
        assert all(digest(adapter.path) == adapter.about.digest for adapter in store.all()), at
        assert found.pop("old") == three
        ends.append(found.get("new"))
        store.add("other", files["three"])
        require_sound(store)
    assert ends == sorted(ends, key=[before, after].index)  # at one step it is done, and stays so
    assert set(ends) == {before, after}


def test_a_full_disk_is_a_typed_error_and_leaves_all_as_it_was(store, files, monkeypatch):
    store.add("a", files["two"])

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="could not be written"):
        store.add("b", files["one"])
    assert {adapter.name for adapter in store.all()} == {"a"}
    monkeypatch.undo()
    store.add("c", files["three"])
    require_sound(store)


# -- the registry itself ------------------------------------------------------------------------------------------


def test_the_registry_is_durable_and_of_one_version(store, files):
    store.add("a", files["one"])
    with sqlite3.connect(store.folder / "registry.sqlite") as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("PRAGMA user_version").fetchone() == (subject.VERSION,)
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(OutputError, match="written as version 99, 1 is known here"):
        store.all()


def test_a_damaged_registry_is_a_typed_error(store, files):
    store.add("a", files["one"])
    for suffix in ("", "-wal", "-shm"):
        Path(f"{store.folder / 'registry.sqlite'}{suffix}").unlink(missing_ok=True)
    (store.folder / "registry.sqlite").write_bytes(b"no database " * 1000)
    with pytest.raises(OutputError, match="sqlite cannot work with it") as fault:
        store.all()
    assert "moved away" in fault.value.fix
    (store.folder / "registry.sqlite").unlink()
    assert store.add("b", files["two"]).name == "b"
    require_sound(store)


def test_a_writer_is_waited_for_but_not_for_ever(store, files, monkeypatch):
    store.add("a", files["one"])
    monkeypatch.setattr("edgelora.files.database.WAIT_SECONDS", 0.1)
    holder = sqlite3.connect(store.folder / "registry.sqlite", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    assert store.get("a").name == "a"  # readers do not wait
    with pytest.raises(OutputError, match="database is locked"):
        store.add("b", files["two"])
    holder.close()
    store.add("b", files["two"])
    require_sound(store)
