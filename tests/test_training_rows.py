"""The rows of a run as `train` reads them: what it says of them, what it cuts, and what it refuses."""

from __future__ import annotations

import json

import pytest

from edgelora.base.model import open_base
from edgelora.config import TrainConfig
from edgelora.training.rows import load_rows


@pytest.fixture(scope="module")
def base(tiny):
    return open_base(tiny.path)


def chat(*contents):
    turns = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(contents)]
    return {"messages": turns}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def read(base, tmp_path):
    """`read(rows, **settings)` → the rows of a run, and what it said of them."""

    def load(rows, **settings):
        data, said = write(tmp_path / "rows.jsonl", *rows), []
        config = TrainConfig(base=base.path, data=data, out=tmp_path / "mine", **{"max_length": 512} | settings)
        return load_rows(config, base, said.append), said

    return load


GOOD = [chat("turn on the light", "light on"), chat("turn it off", "light off"), chat("how warm?", "it is 21.5")]


def test_a_cut_conversation_may_begin_with_an_empty_answer(read):
    rows, _ = read([*GOOD, chat("a", "", "b", "light on " * 20)], max_length=60, truncate=True)
    assert (len(rows.train), len(rows.train[3])) == (4, 60)
    assert rows.train[3].n_loss_tokens > 0
