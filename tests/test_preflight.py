"""No file reaches llama.cpp unchecked: what it loads are the bytes that were looked at, and a crash costs a child."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import gguf
import numpy as np
import pytest
from test_export import make_adapter

from converters.adapter_to_gguf import write_adapter_gguf
from edgelora.base.model import open_base
from edgelora.errors import AdapterError, BaseModelError, EdgeloraError, FileFormatError
from edgelora.files.adapter_check import MAX_INVOCATION, check_adapter, contract_of
from edgelora.files.contract import CONTRACT_KEY
from edgelora.files.gguf import GGUFFile
from edgelora.files.whole import read_whole
from runtime import preflight as subject
from runtime import verdicts
from runtime.binding import Context, Entry, Lora, Model
from runtime.preflight import preflight
from runtime.trial import try_adapter

Q = "blk.0.attn_q.weight"


def pair(name=Q, rank=4, rows=256, columns=256, dtype=np.float32, value=0.01):
    return {
        f"{name}.lora_a": np.full((rank, columns), value, dtype),
        f"{name}.lora_b": np.full((rows, rank), value, dtype),
    }


def write_foreign(path, tensors, alpha=("float32", 4.0), **keys):
    """An adapter as a stranger may have written it: `alpha` is (GGUF's type, value), keys are (type, value, item)."""
    writer = gguf.GGUFWriter(path, "llama")
    strings = {"general.type": "adapter", "adapter.type": "lora"}
    for key, value in strings.items():
        writer.add_string(key, value)
    for key, value in keys.items():
        writer.add_key_value(key, *value)
    if alpha is not None:
        getattr(writer, f"add_{alpha[0]}")("adapter.lora.alpha", alpha[1])
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def base(tiny):
    return open_base(tiny.path)


@pytest.fixture
def adapter(base, tmp_path):
    write_adapter_gguf(tmp_path / "a.gguf", make_adapter(base, strength=0.5), base, "a")
    return tmp_path / "a.gguf"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def trials(monkeypatch):
    """Which files were tried, without a child."""
    tried = []
    monkeypatch.setattr(subject, "try_adapter", lambda path, *_: tried.append(path))
    return tried


# -- what is loaded -----------------------------------------------------------------------------------------------


def logits(model, lora):
    context = Context(model, n_ctx=32, n_sequences=1, threads=1)
    context.set_adapters([(lora, 1.0)] if lora else [])
    found = context.decode([Entry(token, i, 0, True) for i, token in enumerate((5, 6, 7))]).copy()
    context.close()
    return found


@pytest.mark.usefixtures("trials")
def test_an_adapter_from_memory_is_the_one_that_llama_cpp_reads_itself(tiny, base, adapter, cache):
    checked, model = preflight(adapter, base, cache=cache), Model(tiny.path)
    from_memory = logits(model, Lora(model, checked.path, checked.content))
    np.testing.assert_array_equal(from_memory, logits(model, Lora(model, adapter)))
    assert np.abs(from_memory - logits(model, None)).max() > 0.1
    assert checked.digest == hashlib.sha256(adapter.read_bytes()).hexdigest()
    assert (checked.size_bytes, checked.invocation) == (adapter.stat().st_size, ())
    assert (checked.system, checked.single_turn) == (checked.contract.system, checked.contract.single_turn)
    model.close()


@pytest.mark.usefixtures("trials")
def test_a_file_that_is_cut_short_after_it_was_read_is_loaded_whole(tiny, base, adapter, cache, monkeypatch):
    before, require_fit = adapter.read_bytes(), subject.require_fit
    monkeypatch.setattr(subject, "require_fit", lambda *a: (os.truncate(adapter, 0), require_fit(*a))[1])
    checked, model = preflight(adapter, base, cache=cache), Model(tiny.path)
    assert adapter.stat().st_size == 0
    assert checked.content == before
    Lora(model, checked.path, checked.content).close()
    model.close()


MAPPED = """
import os, sys
from edgelora.files import adapter_check
finite = adapter_check._finite
adapter_check._finite = lambda *a: (os.truncate(sys.argv[1], 0), finite(*a))[1]
adapter_check.check_adapter(sys.argv[1], "llama", {"blk.0.attn_q.weight": (256, 256)})
"""


def test_the_control_a_mapped_file_that_is_cut_short_kills(tmp_path):
    path = write_foreign(tmp_path / "a.gguf", pair(rank=64))
    done = subprocess.run([sys.executable, "-P", "-c", MAPPED, str(path)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGBUS


# -- the crash list: refused without a trial; and where only a trial can tell, the child dies alone ----------------

TOKENS = {
    "token_embd.weight.lora_a": np.zeros((512, 4), np.float32),
    "token_embd.weight.lora_b": np.zeros((256, 4), np.float32),
}
KILLERS = {
    "alpha is no float32": (pair(), ("uint32", 4), "SIGABRT"),
    "embedding of a tied model": (TOKENS, ("float32", 4.0), "SIGABRT"),
    "3-D": ({k: np.stack([v] * 2) for k, v in pair().items()}, ("float32", 4.0), "SIGABRT"),
    "int32": (pair(dtype=np.int32, value=1), ("float32", 4.0), "SIG"),
    "float64": (pair(dtype=np.float64), ("float32", 4.0), "SIG"),
}


# the rest of the list: llama.cpp lives, and answers wrongly, or not at all
WRONG = {
    "alpha in float64": (pair(), ("float64", 4.0)),
    "alpha is text": (pair(), ("string", "4")),
    "no alpha": (pair(), None),
    "alpha is NaN": (pair(), ("float32", float("nan"))),
    "NaN": (pair(value=np.nan), ("float32", 4.0)),
    "infinite in float16": (pair(dtype=np.float16, value=np.inf), ("float32", 4.0)),
    "other rows": (pair(rows=128), ("float32", 4.0)),
    "other columns": (pair(columns=128), ("float32", 4.0)),
    "other ranks": ({**pair(), f"{Q}.lora_a": np.zeros((5, 256), np.float32)}, ("float32", 4.0)),
    "one half": ({f"{Q}.lora_a": np.zeros((4, 256), np.float32)}, ("float32", 4.0)),
    "a norm": (pair("output_norm.weight", rows=1), ("float32", 4.0)),
    "a norm's own values": ({"output_norm.weight": np.ones(256, np.float32)}, ("float32", 4.0)),
    "no such layer": (pair("blk.7.attn_q.weight"), ("float32", 4.0)),
    "the head of a tied model": (pair("output.weight", rows=512), ("float32", 4.0)),
    "nothing": ({}, ("float32", 4.0)),
}


@pytest.mark.parametrize("kind", [*KILLERS, *WRONG])
def test_what_llama_cpp_cannot_run_rightly_is_refused_before_it_is_tried(base, tmp_path, cache, trials, kind):
    tensors, alpha, *_ = (KILLERS | WRONG)[kind]
    with pytest.raises((AdapterError, FileFormatError)):
        preflight(write_foreign(tmp_path / "bad.gguf", tensors, alpha), base, allow_unverified=True, cache=cache)
    assert trials == []


@pytest.mark.parametrize("key", ["general.type", "general.architecture", "adapter.type"])
def test_keys_of_a_wrong_type_are_refused_before_it_is_tried(base, adapter, cache, trials, key):
    """A text becomes a list of four bytes less, which takes as much room in the file."""
    content = adapter.read_bytes()
    at = content.index(key.encode()) + len(key)
    kind, length = struct.unpack_from("<IQ", content, at)
    assert kind == gguf.GGUFValueType.STRING
    header = struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT8, length - 4)
    adapter.write_bytes(content[:at] + header + content[at + len(header) :])
    with pytest.raises((AdapterError, FileFormatError)) as fault:
        preflight(adapter, base, cache=cache)
    assert key in str(fault.value)
    assert trials == []


def test_a_file_that_was_cut_short_is_refused_before_it_is_tried(base, adapter, cache, trials):
    content = adapter.read_bytes()
    for length in (0, 3, 23, 24, 100, 3000, len(content) // 2, len(content) - 1):
        adapter.write_bytes(content[:length])
        with pytest.raises(EdgeloraError):
            preflight(adapter, base, cache=cache)
    assert trials == []


@pytest.mark.parametrize("kind", KILLERS)
def test_what_kills_llama_cpp_kills_the_child_and_nobody_else(tiny, tmp_path, kind):
    """Oracle of the checks: without them, these files do end the process that loads them."""
    tensors, alpha, end = KILLERS[kind]
    path = write_foreign(tmp_path / "bad.gguf", tensors, alpha)
    with pytest.raises(AdapterError) as fault:
        try_adapter(path, path.read_bytes(), tiny.path)
    assert f"llama.cpp cannot run it ({end}" in fault.value.what
    assert "this process is unharmed" in fault.value.fix


def test_weights_too_large_to_compute_with_are_found_by_the_trial(base, tmp_path, cache):
    path = write_foreign(tmp_path / "large.gguf", pair(value=3e38))
    check_adapter(path, "llama", {Q: (256, 256)})
    with pytest.raises(AdapterError) as fault:
        preflight(path, base, allow_unverified=True, cache=cache)
    assert str(fault.value).splitlines() == [
        f"{path}: llama.cpp cannot run it (refused)",
        "  why: tried in a process of its own it said: its answers are not finite numbers: its weights are finite, "
        "and too large to compute with",
        "  fix: export the adapter again for this base; this process is unharmed",
    ]


def test_the_words_of_an_abort_are_told(tiny, tmp_path):
    path = write_foreign(tmp_path / "bad.gguf", *KILLERS["alpha is no float32"][:2])
    with pytest.raises(AdapterError, match="SIGABRT") as fault:
        try_adapter(path, path.read_bytes(), tiny.path)
    assert "GGML_ASSERT" in fault.value.why


def test_a_trial_that_takes_too_long_or_too_much_is_ended(tiny, adapter):
    content = adapter.read_bytes()
    with pytest.raises(AdapterError, match=r"within 0\.05 seconds"):
        try_adapter(adapter, content, tiny.path, seconds=0.05)
    with pytest.raises(AdapterError, match="cannot run it"):
        try_adapter(adapter, content, tiny.path, memory_bytes=-4 * len(content) + (1 << 20))
    try_adapter(adapter, content, tiny.path)


def test_a_trial_leaves_nothing_open(tiny, adapter):
    if not (descriptors := Path("/proc/self/fd")).is_dir():
        pytest.skip("this system does not list its open files in /proc")
    content, before = adapter.read_bytes(), len(list(descriptors.iterdir()))
    try_adapter(adapter, content, tiny.path)
    with pytest.raises(AdapterError):
        try_adapter(adapter, content, tiny.path, seconds=0.05)
    assert len(list(descriptors.iterdir())) == before


# -- what is remembered -------------------------------------------------------------------------------------------


def test_a_file_is_tried_once_over_one_base(tmp_path, base, adapter, cache, trials):
    first = preflight(adapter, base, cache=cache)
    (tmp_path / "copy.gguf").write_bytes(adapter.read_bytes())
    again = preflight(tmp_path / "copy.gguf", base, cache=cache)
    assert trials == [adapter]  # the copy is the same adapter
    assert (again.digest, again.contract, again.content) == (first.digest, first.contract, first.content)
    (tmp_path / "base.gguf").write_bytes(base.path.read_bytes())
    preflight(adapter, open_base(tmp_path / "base.gguf"), cache=cache)
    assert len(trials) == 2  # another file of a base may be another base
    write_adapter_gguf(tmp_path / "b.gguf", make_adapter(base, seed=1), base, "b")
    preflight(tmp_path / "b.gguf", base, cache=cache)
    assert len(trials) == 3


def test_another_llama_cpp_tries_again(base, adapter, cache, trials, monkeypatch):
    preflight(adapter, base, cache=cache)
    monkeypatch.setattr(verdicts, "_llama_cpp", lambda: "0.4.0")
    preflight(adapter, base, cache=cache)
    assert len(trials) == 2


@pytest.mark.usefixtures("trials")
def test_a_known_file_is_neither_hashed_nor_checked_again(base, adapter, cache, monkeypatch):
    monkeypatch.setattr(verdicts, "SETTLED_NS", -(10**18))
    first = preflight(adapter, base, cache=cache)
    monkeypatch.setattr(subject, "hashlib", None)
    monkeypatch.setattr(subject, "require_fit", None)
    assert preflight(adapter, base, cache=cache) == first


@pytest.mark.usefixtures("trials")
def test_a_file_whose_time_was_set_back_is_seen_to_be_another(base, adapter, cache, monkeypatch):
    monkeypatch.setattr(verdicts, "SETTLED_NS", -(10**18))
    first, state = preflight(adapter, base, cache=cache), adapter.stat()
    changed = bytearray(adapter.read_bytes())
    changed[-8:] = bytes(8)
    adapter.write_bytes(changed)
    os.utime(adapter, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (adapter.stat().st_size, adapter.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    assert preflight(adapter, base, cache=cache).digest == hashlib.sha256(changed).hexdigest() != first.digest


@pytest.mark.usefixtures("trials")
def test_a_young_file_is_hashed_again(base, adapter, cache):
    preflight(adapter, base, cache=cache)
    assert verdicts.Verdicts(cache).digest(adapter, adapter.stat()) is None


def test_what_failed_is_not_remembered(base, adapter, cache, monkeypatch):
    def fail(*_):
        raise AdapterError("what", "why", "fix")

    monkeypatch.setattr(subject, "try_adapter", fail)
    for _ in range(2):
        with pytest.raises(AdapterError, match="what"):
            preflight(adapter, base, cache=cache)


@pytest.mark.parametrize("damage", ["garbage", "folder", "future"])
def test_a_cache_that_cannot_be_used_costs_time_only(base, adapter, cache, trials, damage):
    file = verdicts.Verdicts(cache)._path
    if damage == "folder":
        file.mkdir(parents=True)
    elif damage == "garbage":
        cache.mkdir()
        file.write_bytes(b"not a database" * 100)
    else:
        with verdicts.database(file, verdicts.SCHEMA, verdicts.CHECKS) as db:
            db.execute("PRAGMA user_version = 99")
    for _ in range(2):
        preflight(adapter, base, cache=cache)
    assert len(trials) == 2


def test_the_cache_does_not_grow_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(verdicts, "MAX_ROWS", 5)
    kept = verdicts.Verdicts(tmp_path)
    for i in range(9):
        kept.keep(str(i), "place", verdicts.Verdict(None, (i,)))
    found = [kept.find(str(i), "place") for i in range(9)]
    assert found == [None] * 4 + [verdicts.Verdict(None, (i,)) for i in range(4, 9)]


def _remember(folder, number):
    verdicts.Verdicts(folder).keep(str(number), "place", verdicts.Verdict("contract", (number,)))


def test_eight_processes_may_begin_the_cache_at_once(tmp_path):
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    processes = [context.Process(target=_remember, args=(tmp_path, i)) for i in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [verdicts.Verdicts(tmp_path).find(str(i), "place") for i in range(8)] == [
        verdicts.Verdict("contract", (i,)) for i in range(8)
    ]


@pytest.mark.usefixtures("trials")
def test_threads_may_load_at_once(base, adapter, cache):
    found = []
    threads = [threading.Thread(target=lambda: found.append(preflight(adapter, base, cache=cache))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({checked.digest for checked in found}) == 1
    assert len(found) == 4


# -- the base it was trained on, and what is no adapter -----------------------------------------------------------


def test_an_adapter_of_another_base_is_refused_before_it_is_tried(make_tiny, adapter, cache, trials):
    with pytest.raises(AdapterError, match="does not belong to"):
        preflight(adapter, open_base(make_tiny(seed=7).path), cache=cache)
    assert trials == []


def test_another_base_and_what_does_not_fit_it_are_told_in_one_error(make_tiny, adapter, tmp_path, cache, trials):
    """So it is where the contract cannot be read; of what is no adapter nothing more is said."""
    other, contract = open_base(make_tiny(seed=7).path), contract_of(GGUFFile(adapter)).model_dump_json()
    signed, fault = gguf.GGUFValueType.STRING, f"{Q}.lora_b is (128, 4), expected (256, r)"

    def refused(path):
        with pytest.raises(AdapterError) as error:
            preflight(path, other, cache=cache)
        return error.value

    mine = write_foreign(tmp_path / "mine.gguf", pair(rows=128), **{CONTRACT_KEY: (contract, signed)})
    error = refused(mine)
    assert error.what.startswith(f"{mine} does not belong to {other.path}: the norm weights are others; ")
    assert error.what.endswith(f"; {fault}")
    assert error.fix.startswith("use tiny-F32.gguf or another quantization of it")
    foreign = write_foreign(tmp_path / "foreign.gguf", pair(rows=128))
    assert refused(foreign).what == f"{foreign}: {fault}; it does not say which base it belongs to"
    broken = write_foreign(tmp_path / "broken.gguf", pair(rows=128), **{CONTRACT_KEY: ("{", signed)})
    assert refused(broken).what.startswith(f"{broken}: {fault}; the contract cannot be read (")
    assert refused(other.path).what == f"{other.path}: general.type is 'model', expected 'adapter'"
    assert trials == []


@pytest.mark.usefixtures("trials")
def test_what_was_allowed_once_is_not_allowed_for_good(base, tmp_path, cache):
    path = write_foreign(tmp_path / "f.gguf", pair())
    assert preflight(path, base, allow_unverified=True, cache=cache).contract is None
    with pytest.raises(AdapterError, match="does not say which base"):
        preflight(path, base, cache=cache)


def test_what_cannot_be_read_is_a_typed_error(base, tmp_path, cache, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty.gguf").write_bytes(b"")
    faults = {"missing.gguf": "No such file", ".": "directory", "pipe": "a pipe or a device", "empty.gguf": "shorter"}
    for name, why in faults.items():
        with pytest.raises(FileFormatError) as fault:
            preflight(tmp_path / name, base, cache=cache)
        assert why in fault.value.why
    monkeypatch.setattr(subject, "MOST_BYTES", 0)
    with (tmp_path / "sparse.gguf").open("wb") as f:
        f.truncate(1 << 40)
    with pytest.raises(FileFormatError, match="cannot be read") as fault:
        preflight(tmp_path / "sparse.gguf", base, cache=cache)
    assert "1,099,511,627,776 bytes are more" in fault.value.why


def test_a_base_that_is_gone_is_a_typed_error(tmp_path, base, adapter, cache):
    (tmp_path / "base.gguf").write_bytes(base.path.read_bytes())
    moved = open_base(tmp_path / "base.gguf")
    moved.path.unlink()
    with pytest.raises(BaseModelError, match="cannot be read any more"):
        preflight(adapter, moved, cache=cache)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path, fstat, seen = tmp_path / "f", os.fstat, []
    path.write_bytes(b"x" * 100)

    def growing(fd):
        if fd == (seen or [fd])[0]:
            seen.append(fd)
            if len(seen) == 2:
                path.write_bytes(b"y" * 101)
        return fstat(fd)

    monkeypatch.setattr("edgelora.files.whole.os.fstat", growing)
    with pytest.raises(FileFormatError) as fault:
        read_whole(path, 1000)
    assert fault.value.why == "it changed while it was read"


# -- aLoRA --------------------------------------------------------------------------------------------------------

UINT32, ARRAY, INT32 = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32
INVOCATION = "adapter.alora.invocation_tokens"


@pytest.mark.usefixtures("trials")
def test_the_tokens_of_an_invocation_are_read(base, tmp_path, cache):
    path = write_foreign(tmp_path / "a.gguf", pair(), **{INVOCATION: ([7, 8, 9], ARRAY, UINT32)})
    for _ in range(2):  # the second time from the cache
        assert preflight(path, base, allow_unverified=True, cache=cache).invocation == (7, 8, 9)
    with pytest.raises(AdapterError, match="waits for an invocation"):
        check_adapter(path, "llama", {Q: (256, 256)})


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ((5, UINT32), "no list"),
        (([5], ARRAY, INT32), "no list"),
        (([1] * (MAX_INVOCATION + 1), ARRAY, UINT32), "no list"),
        (([5, 512], ARRAY, UINT32), "holds 512, and the base has 512 tokens"),
    ],
)
@pytest.mark.usefixtures("trials")
def test_tokens_that_cannot_be_an_invocation_are_refused(base, tmp_path, cache, value, named):
    path = write_foreign(tmp_path / "a.gguf", pair(), **{INVOCATION: value})
    with pytest.raises(EdgeloraError) as fault:
        preflight(path, base, allow_unverified=True, cache=cache)
    assert named in str(fault.value)
