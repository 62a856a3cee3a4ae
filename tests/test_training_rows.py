"""The rows of a run as `train` reads them: what it says of them, what it cuts, and what it refuses."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter

import numpy as np
import pytest

from edgelora.base.model import open_base
from edgelora.config import TrainConfig
from edgelora.errors import DataError
from edgelora.training.objectives import objective_of
from edgelora.training.rows import load_rows
from edgelora.training.run import run_training


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
def events():
    """What the reading told of how far it is."""
    return []


@pytest.fixture
def read(base, tmp_path, events):
    """`read(rows, **settings)` → the rows of a run, and what it said of them."""

    def load(rows, **settings):
        data, said = write(tmp_path / "rows.jsonl", *rows), []
        config = TrainConfig(base=base.path, data=data, out=tmp_path / "mine", **{"max_length": 512} | settings)
        return load_rows(config, base, said.append, events.append), said

    return load


GOOD = [chat("turn on the light", "light on"), chat("turn it off", "light off"), chat("how warm?", "it is 21.5")]


def test_a_cut_conversation_may_begin_with_an_empty_answer(read):
    rows, _ = read([*GOOD, chat("a", "", "b", "light on " * 20)], max_length=60, truncate=True)
    assert (len(rows.train), len(rows.train[3])) == (4, 60)
    assert rows.train[3].n_loss_tokens > 0


def test_what_was_read_and_cut_is_said_and_kept(read, tmp_path):
    long, valid = chat("a", "light on", "b", "light on " * 20), write(tmp_path / "valid.jsonl", chat("b", "it is off"))
    rows, said = read([*GOOD, long], max_length=60, truncate=True, valid=valid)
    assert said == [
        f"data: {rows.check.summary}", f"held-out data: {rows.valid_check.summary}", *rows.check.warnings,
    ]  # fmt: skip
    assert re.fullmatch(
        r"data: chat \(4\), [\d,]+ tokens, \d+\.\d% of them learned; "
        r"cut: 1 row, by \d+ tokens, 1 whole answer and the end of 0",
        said[0],
    )
    assert said[1].startswith("held-out data: chat (1), ")
    assert said[2] == "1 answer left out whole: the rows are longer than max_length"
    assert (rows.facts["formats"], rows.facts["cut"], rows.facts["lost_turns"]) == ({"chat": 4}, 1, 1)
    assert rows.facts["tokens"] - rows.facts["lost_tokens"] == rows.train.n_tokens
    assert rows.facts["valid"]["tokens"] == rows.valid.n_tokens
    assert json.loads(json.dumps(rows.facts))["warnings"] == [said[2]]


def test_what_is_odd_in_held_out_rows_is_said(read, tmp_path):
    odd = [chat("b", "it is off"), chat("b", "it is off"), chat("c", " ", "d", "it <|im_end|> is")]
    rows, said = read(GOOD, valid=write(tmp_path / "valid.jsonl", *odd))
    assert said[2:] == [f"held-out: {warning}" for warning in rows.valid_check.warnings]
    assert [re.search(r"1 row (with|the) .*", line)[0].split(" (")[0] for line in said[2:]] == [
        "1 row the same as an earlier one",
        "1 row with the text of a special token in what is said: it stays text, for the template writes those",
        "1 row with an empty answer among the turns",
    ]


@pytest.mark.parametrize(("method", "n"), [("lora", 0), ("prompt_tuning", 20)])
def test_a_length_that_the_base_does_not_see_is_not_offered(base, read, method, n):
    """Virtual tokens take their part of its context."""
    most = base.context - n
    with pytest.raises(DataError) as caught:
        read([chat("a", "on " * base.context)], max_length=most, method=method)
    assert caught.value.why.startswith(f"the base sees no more than {most} tokens, and ")
    assert caught.value.fix == "pass --truncate, or shorten these rows"


def test_held_out_rows_that_teach_nothing_are_refused(read, tmp_path):
    valid = write(tmp_path / "valid.jsonl", {"input_ids": [5, 6, 7], "labels": [-100] * 3})
    with pytest.raises(DataError) as caught:
        read(GOOD, valid=valid)
    assert caught.value.what == "held-out data: no row has a token to learn: all labels are masked"


def test_reading_tells_how_far_it_is(read, tmp_path, events):
    valid = write(tmp_path / "valid.jsonl", *[chat("b", str(i)) for i in range(101)])
    read([chat("a", str(i)) for i in range(500)], valid=valid)
    assert [(e.stage, e.step, e.total) for e in events] == [("read", n, 601) for n in (200, 400, 600)]
    assert all(e.eta_s >= 0 for e in events)


def test_each_source_is_seen_by_its_weight(base, tmp_path):
    a, b, c = (write(tmp_path / name, *GOOD, chat(name, "on")) for name in "abc")
    config = TrainConfig(base=base.path, data=[f"{a}:2", b, f"{c}:0.5"], out=tmp_path / "mine", max_length=512)
    order = load_rows(config, base, lambda _: None).order(config)
    seen = Counter("abc"[number // 4] for step in range(7) for number in order.rows(step))
    assert (order.epoch_rows, config.batch_rows, seen) == (14, 8, {"a": 32, "b": 16, "c": 8})


def rated(answer, label=True):
    return {"prompt": "q", "completion": answer, "label": label}


@pytest.mark.parametrize(
    ("rows", "held_out", "name"),
    [
        ([rated("yes")], None, "data"),
        ([rated("yes"), rated("yes", False), rated("yes")], None, "data"),
        ([rated("yes"), rated("no", False)], [rated("yes")], "held-out data"),
    ],
    ids=["one", "the same", "one held out"],
)
def test_kto_needs_rows_that_differ(base, tmp_path, rows, held_out, name):
    data, valid = write(tmp_path / "rows.jsonl", *rows), held_out and write(tmp_path / "valid.jsonl", *held_out)
    with pytest.raises(DataError) as caught:
        run_training(TrainConfig(base=base.path, data=data, valid=valid, out=tmp_path / "mine", objective="kto"))
    assert str(caught.value).splitlines() == [
        f"{name}: no two rows differ, too few for the objective kto",
        "  why: its KL term is estimated from prompts with the answers of other rows",
        "  fix: give it two different rows or more",
    ]
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".jsonl"] == []


def test_kto_takes_two_rows_that_differ(read):
    rows, _ = read([rated("yes"), rated("no", False), rated("no")], objective="kto")
    assert (len(rows.train), rows.check.distinct) == (3, 2)


@pytest.mark.parametrize("batch_rows", [2, 4])
@pytest.mark.parametrize("system", ["", "Answer in as few words as there can be, and never in more than these."])
def test_no_micro_batch_of_a_run_is_larger_than_the_heaviest(read, system, batch_rows):
    """Of rows that begin alike that is less than their sum: the beginning is computed once."""
    spoken = [chat(f"what is {i} and {i} " * (1 + i % 3), "it is two of them") for i in range(12)]
    begins = [{"role": "system", "content": system}] if system else []
    asked = {"batch_rows": batch_rows, "micro_batch_tokens": 400}
    rows, _ = read([{"messages": [*begins, *row["messages"]]} for row in spoken], **asked)
    config = TrainConfig(base="b", data="d", out="o", **asked)
    heaviest, objective = rows.heaviest(config), objective_of(config)
    steps = itertools.combinations([rows.train[i] for i in range(12)], batch_rows)
    batches = [batch for step in steps for batch in objective.pack(list(step), 400)]
    assert heaviest.tokens == max(len(batch.input_ids) for batch in batches)
    assert heaviest.longest == max(rows.train.lengths)
    assert heaviest.tokens < np.sort(rows.train.lengths)[-batch_rows:].sum()
