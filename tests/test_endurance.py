"""Nothing is left behind by loading, switching and unloading, however often."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from live_walk import ask
from test_export import make_adapter

from converters.adapter_to_gguf import write_adapter_gguf
from edgelora.base.model import open_base
from runtime.engine import Engine
from runtime.service import EngineConfig

CYCLES = int(os.environ.get("EDGELORA_CYCLES", "200"))  # benchmarks/live.py takes 10,000
PROMPT = tuple(range(5, 40))


def resident_bytes() -> int:
    """Private memory: mapped files come and go with the kernel's mood."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def n_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(sys.platform != "linux", reason="memory and descriptors are counted in /proc")
def test_cycles_of_loading_switching_and_unloading_leave_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGELORA_HOME", str(tmp_path / "home"))
    base = open_base(tiny.path)
    for seed in range(2):
        write_adapter_gguf(tmp_path / f"{seed}.gguf", make_adapter(base, seed=seed, strength=0.5), base, str(seed))
    config = EngineConfig(context=256, chunk=16, threads=1, snapshot_bytes=1 << 20)
    with Engine.open(base, config) as engine:

        def cycle(i: int) -> None:
            name = str(i % 2)
            engine.load(name, tmp_path / f"{name}.gguf")
            ask(engine, (i % 500, *PROMPT), {name: 1.0}, 2)
            ask(engine, (i % 500, *PROMPT), {}, 2)
            engine.unload(name)

        for i in range(100):  # fills what has a limit: snapshots, buffers of the allocator
            cycle(i)
        before, descriptors = resident_bytes(), n_open_files()
        for i in range(CYCLES):
            cycle(i)
        growth = resident_bytes() - before
        print("MEASURED", json.dumps({"cycles": CYCLES, "growth_bytes": growth}))
        assert growth < 5 << 20
        assert n_open_files() <= descriptors  # fewer, where the garbage of an earlier test went meanwhile
        assert engine.stats().adapter_bytes == 0
