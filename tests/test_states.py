"""What is kept answers for nobody else: random walks over quantized bases, snapshots in RAM and on disk."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from live_walk import Walk
from test_export import make_adapter

from converters.adapter_to_gguf import write_adapter_gguf
from edgelora.base.model import open_base
from runtime.engine import Engine
from runtime.scheduler import Scheduler
from runtime.service import EngineConfig, Request
from runtime.snapshot_files import SnapshotFolder
from runtime.states import Snapshot, Snapshots, chain_of, common, cut

CONFIG = EngineConfig(context=256, chunk=16, threads=1)
STEPS = int(os.environ.get("EDGELORA_WALK", "60"))  # benchmarks/live.py takes 500, of each of four
N_ADAPTERS = 8 if STEPS > 100 else 4


pytestmark = pytest.mark.usefixtures("own_home")


@pytest.fixture(scope="module", params=["Q4_K", "Q8_0"])
def quantized(request, make_tiny):
    return open_base(make_tiny(GGMLQuantizationType[request.param]).path)


@pytest.fixture(scope="module")
def files(quantized, tmp_path_factory):
    """Strong adapters over a quantized base."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed in range(N_ADAPTERS):
        adapter = make_adapter(quantized, seed=seed, strength=0.5)
        write_adapter_gguf(folder / f"{seed}.gguf", adapter, quantized, str(seed))
    return {f"adapter-{seed}": folder / f"{seed}.gguf" for seed in range(N_ADAPTERS)}


@pytest.mark.parametrize("hot", [0, 2])
def test_over_a_quantized_base_every_answer_is_that_of_a_cold_run(quantized, files, tmp_path, hot):
    config = EngineConfig(
        context=256, chunk=16, threads=1, hot_adapters=hot, snapshot_bytes=300_000, snapshot_folder=tmp_path
    )
    walk = Walk(quantized, files, config)
    wrong = list(walk.run(STEPS)).count(False)
    print("MEASURED", json.dumps({f"{quantized.quant}, {hot} hot": {"answers": STEPS, "wrong": wrong}}))
    assert wrong == 0
    assert walk.reused > 10 * STEPS


def test_the_walk_notices_when_keys_are_left_out(quantized, files, monkeypatch):
    """The control: keyed by tokens alone, as llama-cpp-python reuses its prefix, answers are wrong."""
    monkeypatch.setattr("runtime.states.named", lambda _: b"")
    assert list(Walk(quantized, files, CONFIG).run(60)).count(False) > 0


def test_prompts_are_cut_at_multiples_and_where_adapters_begin():
    key = (("a", 1.0),)
    parts = cut(range(20), [(0, ()), (10, key)], 8)
    assert [(part.first, part.last, part.key) for part in parts] == [
        (0, 8, ()), (8, 10, ()), (10, 16, key), (16, 20, key),
    ]  # fmt: skip
    assert [token for part in parts for token in part.tokens] == [*range(20)]


def test_a_cut_is_named_by_all_that_stands_before_it():
    def chain(tokens=range(20), phases=((0, (("a", 1.0),)),), root=b""):
        return chain_of(cut(tokens, phases, 8), 8, root)

    same = chain()
    assert len(same) == len(set(same)) == 2
    assert common(same, chain(range(17))) == 2
    assert common(same, chain(range(16))) == 1  # its last token must be evaluated
    assert common(same, chain([*range(12), 0, *range(13, 20)])) == 1
    for other in (
        chain(phases=((0, (("a", 0.5),)),)),
        chain(phases=((0, (("b", 1.0),)),)),
        chain(phases=((0, ()),)),
        chain(phases=((0, ()), (4, (("a", 1.0),)))),
        chain([1, *range(1, 20)]),
        chain(root=b"another base"),
    ):
        assert common(same, other) == 0


def snapshot(*names, n_bytes=100):
    return Snapshot(tuple(name.encode() for name in names), np.arange(n_bytes, dtype=np.uint8))


def test_snapshots_leave_in_the_order_of_their_last_use(tmp_path):
    archive = SnapshotFolder(tmp_path, {}, 10_000)
    kept = Snapshots(250, archive)
    kept.keep(snapshot("a", "b"))
    kept.keep(snapshot("a", "c"))
    assert kept.longest((b"a", b"b", b"x"))[0] == 2
    kept.keep(snapshot("d"))
    assert (len(kept), kept.n_bytes) == (2, 200)
    assert [kept.longest((b"a", end))[1].chain[-1] for end in (b"b", b"x")] == [b"b", b"b"]
    assert archive.longest((b"a", b"c"))[0] == kept.longest((b"a", b"c"))[0] == 2  # it went to the archive
    kept.keep(snapshot("a", "b", "e"))
    assert len(kept) == 2  # in place of the one that it goes on from
    assert not kept.wants((b"a",), 100)
    assert not kept.wants((b"f",), 251)


def test_a_file_is_believed_only_if_it_is_what_was_written(tmp_path):
    kept, identity = snapshot("a" * 32, "b" * 32), {"base": "one", "settings": [1, "f16"]}
    SnapshotFolder(tmp_path, identity, 10_000).keep(kept)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o077 == 0
    whole = path.read_bytes()
    shared, found = SnapshotFolder(tmp_path, identity, 10_000).longest((*kept.chain, b"more"))
    assert (shared, found.chain, found.state.tolist()) == (2, kept.chain, kept.state.tolist())
    assert SnapshotFolder(tmp_path, {**identity, "base": "two"}, 10_000).longest(kept.chain) is None
    for at in (0, 20, 100, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        assert SnapshotFolder(tmp_path, identity, 10_000).longest(kept.chain) is None
    for length in (0, 10, 30, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert SnapshotFolder(tmp_path, identity, 10_000).longest(kept.chain) is None


def test_the_folder_keeps_to_its_budget(tmp_path):
    folder = SnapshotFolder(tmp_path, {}, 2_000)
    for name in "abcdefgh":
        folder.keep(snapshot(name * 32, n_bytes=500))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2_000
    assert folder.longest((b"h" * 32,)) is not None
    assert folder.longest((b"a" * 32,)) is None


def test_a_conversation_goes_on_after_a_restart(quantized, files, tmp_path):
    config = EngineConfig(context=256, chunk=16, threads=1, snapshot_folder=tmp_path)
    usages = []
    for conversations in (1, 1, 2):  # a context of several sequences computes in other shapes: not reused there
        with Engine.open(quantized, replace(config, conversations=conversations)) as engine:
            engine.load("a", files["adapter-0"])
            stream = engine.generate(Request(tuple(range(5, 80)), {"a": 1.0}, max_tokens=4))
            list(stream)
            usages.append(stream.usage)
    assert [usage.reused_tokens for usage in usages] == [0, 64, 0]


def test_another_conversation_with_the_same_beginning_takes_it_over(quantized, monkeypatch):
    """Of two that run at once the second copies what the first has computed of a prefix they share."""
    step = Scheduler.step
    monkeypatch.setattr(Scheduler, "step", lambda self: time.sleep(0.01) or step(self))
    prompt = tuple(range(5, 80))
    with Engine.open(quantized, replace(CONFIG, conversations=2)) as engine:
        first = engine.generate(Request(prompt, max_tokens=150))
        pieces = iter(first)
        next(pieces)
        second = engine.generate(Request((*prompt, 99), max_tokens=4))
        list(second)
        first.cancel()
        list(pieces)
    assert (first.usage.reused_tokens, second.usage.reused_tokens) == (0, 64)


def test_what_was_taken_over_is_there_before_the_next_decode(quantized, monkeypatch):
    """A second conversation takes over a prefix, is cancelled before it computes, and its sequence is saved."""
    prompt, config = tuple(range(5, 80)), replace(CONFIG, conversations=2)
    with Engine.open(quantized, config) as engine:
        expected = [piece.tokens for piece in engine.generate(Request((*prompt, 99), max_tokens=8))]
    step = Scheduler.step
    monkeypatch.setattr(Scheduler, "step", lambda self: time.sleep(0.01) or step(self))
    with Engine.open(quantized, config) as engine:
        first = engine.generate(Request(prompt, max_tokens=150))
        pieces = iter(first)
        next(pieces)

        def meanwhile():
            taken = engine.generate(Request((*prompt, 98), max_tokens=8))
            engine._scheduler._admit()
            engine._scheduler.cancel(taken)
            other = engine.generate(Request((7,) * 40, max_tokens=2))
            engine._scheduler._admit()  # into the same sequence: what it held is saved
            return other

        list(engine._owner.call(meanwhile))
        first.cancel()
        list(pieces)
        for other in ((8,) * 40, (9,) * 40):  # nothing is left in the contexts
            list(engine.generate(Request(other, max_tokens=2)))
        stream = engine.generate(Request((*prompt, 99), max_tokens=8))
        assert [piece.tokens for piece in stream] == expected
        assert stream.usage.reused_tokens == 64
