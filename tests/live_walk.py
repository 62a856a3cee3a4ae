"""Random loads, switches, scales, reloads, restarts and conversations on a live engine, each answer against a cold one.

`tests/test_states.py` takes a few steps of it, `benchmarks/live.py` two thousand in all.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from test_export import make_adapter

from converters.adapter_to_gguf import write_adapter_gguf
from edgelora.base.model import Base
from runtime.engine import Engine
from runtime.service import EngineConfig, Request

SCALES = (1.0, 1.0, 1.0, 0.5, -0.7, 1.5)
N_TOKENS = 6


def strong_adapters(base: Base, folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """An adapter file of each name, seeded by its place, that changes what the base says."""
    for seed, name in enumerate(names):
        write_adapter_gguf(folder / f"{name}.gguf", make_adapter(base, seed=seed, strength=0.5), base, name)
    return {name: folder / f"{name}.gguf" for name in names}


def ask(engine: Engine, prompt: Sequence[int], adapters: Mapping[str, float], n: int = N_TOKENS) -> list[int]:
    stream = engine.generate(Request(tuple(prompt), adapters, max_tokens=n))
    return [token for piece in stream for token in piece.tokens]


def prompts_with_shared_prefixes(draw: random.Random, n: int, longest: int, n_vocab: int) -> list[list[int]]:
    """`n` prompts of random ids, of which each but the first goes on from somewhere in another."""
    found = [[draw.randrange(3, n_vocab) for _ in range(longest)]]
    while len(found) < n:
        stem = draw.choice(found)
        stem = stem[: draw.randrange(1, len(stem))]
        found.append(stem + [draw.randrange(3, n_vocab) for _ in range(draw.randrange(1, longest - len(stem) + 1))])
    return found


@dataclass
class Walk:
    """`files`: adapters of `base` by name. A reload gives a name the content of another file."""

    base: Base
    files: Mapping[str, Path]
    config: EngineConfig
    seed: int = 0
    n_prompts: int = 10
    longest: int = 60
    reused: int = 0
    """Tokens of prompts that were not evaluated again."""
    _expected: dict[tuple[object, ...], list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._draw = random.Random(self.seed)
        n_vocab = len(self.base.tokenizer.tokens)
        self._prompts = prompts_with_shared_prefixes(self._draw, self.n_prompts, self.longest, n_vocab)
        names = sorted(self.files)
        draw, pick = self._draw, lambda: self._draw.choice(SCALES)
        self._sets = [{}, *({name: 1.0} for name in names)]
        self._sets += [dict(zip(draw.sample(names, 2), (pick(), pick()), strict=True)) for _ in range(6)]
        self._sets += [{draw.choice(names): pick()} for _ in range(6)]

    def run(self, steps: int) -> Iterator[bool]:
        """Whether each of `steps` answers is that of an engine that has never seen anything else."""
        content = {name: name for name in self.files}
        engine = self._opened(content)
        try:
            for _ in range(steps):
                event = self._draw.random()
                name = self._draw.choice(sorted(content))
                if event < 0.1:
                    content[name] = self._draw.choice(sorted(self.files))
                    engine.load(name, self.files[content[name]])
                elif event < 0.2:
                    engine.unload(name)
                    engine.load(name, self.files[content[name]])
                elif event < 0.22 and self.config.snapshot_folder is not None:
                    engine.close()
                    engine = self._opened(content)
                yield self._step(engine, content)
        finally:
            engine.close()

    def _step(self, engine: Engine, content: Mapping[str, str]) -> bool:
        adapters, prompt = self._draw.choice(self._sets), self._draw.choice(self._prompts)
        stream = engine.generate(Request(tuple(prompt), adapters, max_tokens=N_TOKENS))
        answer = [token for piece in stream for token in piece.tokens]
        assert stream.usage is not None
        self.reused += stream.usage.reused_tokens
        expected = self._cold({content[name]: 0.0 for name in adapters}, adapters, content, prompt)
        if self._draw.random() < 0.3 and len(prompt) + N_TOKENS < self.longest + 20:
            self._prompts.append([*prompt, *answer, self._draw.randrange(3, 100)])  # the conversation goes on
        return answer == expected

    def _cold(
        self, scales: dict[str, float], adapters: Mapping[str, float], content: Mapping[str, str], prompt: list[int]
    ) -> list[int]:
        for name, scale in adapters.items():
            scales[content[name]] += scale
        key = (*sorted(scales.items()), tuple(prompt))
        if key not in self._expected:
            config = replace(self.config, hot_adapters=0, snapshot_folder=None, snapshot_bytes=0)
            with Engine.open(self.base, config) as engine:
                for name in scales:
                    engine.load(name, self.files[name])
                self._expected[key] = ask(engine, prompt, scales)
        return self._expected[key]

    def _opened(self, content: Mapping[str, str]) -> Engine:
        engine = Engine.open(self.base, self.config)
        for name, file in content.items():
            engine.load(name, self.files[file])
        return engine
