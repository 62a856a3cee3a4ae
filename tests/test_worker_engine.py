"""The engine in a worker's child: the same answers, before and after its death."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_export import make_adapter

from converters.adapter_to_gguf import write_adapter_gguf
from edgelora.base.model import open_base
from edgelora.device import Choice
from edgelora.errors import AdapterError, WorkerDied
from runtime.engine import Engine
from runtime.service import EngineConfig, Request, Sampling, Service
from runtime.worker import Worker


@pytest.fixture
def files(tiny, tmp_path, monkeypatch) -> dict[str, Path]:
    """Two adapters over the tiny model; what is known of checked files is kept beside them."""
    monkeypatch.setenv("EDGELORA_HOME", str(tmp_path / "home"))
    base = open_base(tiny.path)
    for seed, name in enumerate(("one", "two")):
        write_adapter_gguf(tmp_path / f"{name}.gguf", make_adapter(base, seed=seed, strength=0.5), base, name)
    return {name: tmp_path / f"{name}.gguf" for name in ("one", "two")}


def tokens(service: Service, adapters: dict[str, float], **sampling: Any) -> list[int]:
    request = Request([*range(5, 30)], adapters, Sampling(**sampling), max_tokens=8)
    return [token for piece in service.generate(request) for token in piece.tokens]


def test_the_engine_answers_from_there_as_from_here_and_after_its_death(tiny, files):
    config = EngineConfig(context=256, chunk=8, threads=1)
    asked = ({}, {"one": 1.0}, {"two": 1.0}, {"one": 0.5, "two": -0.5})
    with Engine.open(tiny.path, config) as engine:
        loaded = [engine.load(name, path) for name, path in files.items()]
        expected = [tokens(engine, adapters) for adapters in asked]
        drawn = tokens(engine, {}, temperature=1.5, seed=7)
        name = engine.name
    assert len({*map(tuple, expected), tuple(drawn)}) == 5
    with Worker.open(tiny.path, config) as worker:
        assert [worker.load(name, path) for name, path in files.items()] == loaded
        for _ in range(2):
            assert [tokens(worker, adapters) for adapters in asked] == expected
            assert tokens(worker, {}, temperature=1.5, seed=7) == drawn
            assert (worker.name, worker.threads) == (name, Choice("1", "asked for"))
            stream = worker.generate(Request([5, 6, 7], {"one": 1.0}, max_tokens=200))
            pieces = iter(stream)
            next(pieces)
            worker._supervisor._child.kill("a test does")
            with pytest.raises(WorkerDied):
                list(pieces)
        worker.unload("one")
        with pytest.raises(AdapterError, match="no adapter named one"):
            tokens(worker, {"one": 1.0})


def test_usage_and_cancelling_are_the_engines(tiny):
    config = EngineConfig(context=512, chunk=8, threads=1)
    request = Request([*range(5, 30)], sampling=Sampling(logprobs=2, logit_bias={0: -200.0, 2: -200.0}), max_tokens=400)
    with Worker.open(tiny.path, config) as worker:
        stream = worker.generate(request)
        first = next(iter(stream))
        assert first.logprobs[0].token == first.tokens[0]
        assert len(first.logprobs[0].top) == 2
        stream.cancel()
        assert stream.usage.finish == "cancelled"
        assert stream.usage.generated_tokens < 400
        stream = worker.generate(replace(request, max_tokens=3))
        assert sum(len(piece.tokens) for piece in stream) == 3
        usage = stream.usage
        assert (usage.finish, usage.prompt_tokens, usage.generated_tokens) == ("length", 25, 3)
        assert usage.reused_tokens == 24
