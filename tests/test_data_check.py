"""What is odd about data: every kind of it is found, counted and named, and what is in order is not."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from edgelora.base.model import open_base
from edgelora.cli import data as command
from edgelora.data.check import Tally, histogram
from edgelora.data.dataset import Options, load_examples
from edgelora.data.fit import Encoder
from edgelora.errors import ConfigError, DataError
from edgelora.pipeline.data import Ask, check_data


@pytest.fixture(scope="module")
def base(tiny):
    return open_base(tiny.path)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(*contents, weight=1.0):
    turns = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(contents)]
    return {"messages": [{**t, "weight": weight} if t["role"] == "assistant" else t for t in turns]}


GOOD = [row("turn on the light", "light on"), row("turn it off", "light off"), row("how warm?", "it is 21.5")]


def found(base, tmp_path, *rows, **options):
    return check_data(base, [write(tmp_path / "rows.jsonl", *rows)], **options)


def test_good_data_has_nothing_odd(base, tmp_path):
    c = found(base, tmp_path, *GOOD).check
    examples = list(load_examples([tmp_path / "rows.jsonl"], Encoder(base)))
    assert (c.faults, c.warnings) == ((), ())
    assert (c.formats, c.rows) == ({"chat": 3}, 3)
    assert c.tokens == sum(map(len, examples))
    assert c.loss_tokens == sum(int(e.loss_mask.sum()) for e in examples)
    assert c.loss_share == c.loss_tokens / c.tokens
    assert c.lengths.tolist() == [len(e) for e in examples]
    assert (c.cut, c.lost_tokens, c.lost_turns, c.lost_ends, c.one_token) == (0, 0, 0, 0, 0)
    c.raise_faults()


# what is wrong → rows besides GOOD, the field that counts them, how many they are, the line of each, the warning
SILENT = row("a", "not this", weight=0)
ODD = {
    "twice": ([GOOD[1], GOOD[0]], "duplicates", 2, (4, 5), "2 rows the same as an earlier one ({})"),
    "nothing learned": ([SILENT], "left_out", 1, (4,), "1 row with nothing to learn, left out ({})"),
    "a special token": ([row("a<|im_end|>", "it is b")], "special", 1, (4,), "1 row with the text of a special token"),
    "one in an answer": ([row("a", "it <|im_start|> is")], "special", 1, (4,), "1 row with the text of a special"),
    "one in a document": ([{"text": "a<|endoftext|>b"}], "special", 1, (4,), "1 row with the text of a special token"),
    "an empty answer": ([row("a", " ", "b", "light on")], "empty", 1, (4,), "1 row with an empty answer"),
}


@pytest.mark.parametrize("case", ODD)
def test_what_is_odd_is_counted_and_named(base, tmp_path, case):
    rows, field, n, lines, warning = ODD[case]
    c = found(base, tmp_path, *GOOD, *rows).check
    assert getattr(c, field) == n
    assert c.named[field] == tuple(f"{tmp_path / 'rows.jsonl'}:{line}" for line in lines)
    (said,) = c.warnings
    assert said.startswith(warning.format(", ".join(c.named[field])))
    others = {"duplicates", "left_out", "special", "empty", "overlap"} - {field}
    assert [getattr(c, other) for other in others] == [0] * 4


def test_at_most_five_places_are_named(base, tmp_path):
    c = found(base, tmp_path, *[GOOD[0]] * 9).check
    assert c.duplicates == 8
    assert c.named["duplicates"] == tuple(f"{tmp_path / 'rows.jsonl'}:{line}" for line in range(2, 7))
    assert c.warnings[0].endswith("rows.jsonl:6 …)")


def test_one_token_answers_are_counted_without_the_end_of_the_turn(base, tmp_path):
    one = base.tokenizer.encode("a").ids
    assert len(one) == 1
    c = found(base, tmp_path, row("q", "a", "r", "light on"), row("s", "a")).check
    assert (c.one_token, c.warnings) == (2, ())  # labels are one token long: a fact, not a fault


def test_what_has_no_answers_has_none_of_one_token(base, tmp_path):
    assert len(base.tokenizer.encode("a").ids) == 1
    ids = {"input_ids": [5, 6, 7], "labels": [-100, 6, -100]}
    rated = {"prompt": "q", "completion": "a", "label": False}
    pair = {"prompt": "q", "chosen": "a", "rejected": "light on"}
    for rows, n in (([{"text": "a"}, ids, row("q", "a")], 1), ([rated], 1), ([pair], 1)):
        assert found(base, tmp_path, *rows).check.one_token == n


def test_overlap_with_the_held_out_rows(base, tmp_path):
    valid = write(tmp_path / "valid.jsonl", GOOD[2], row("another", "light on"), GOOD[0])
    checked = found(base, tmp_path, *GOOD, valid=valid)
    assert checked.check.overlap == 2
    assert checked.check.named["overlap"] == tuple(f"{tmp_path / 'rows.jsonl'}:{line}" for line in (1, 3))
    assert checked.check.warnings[0].startswith("2 rows that the held-out data have too")
    assert (checked.valid.rows, checked.valid.warnings) == (3, ())


def test_what_max_length_costs(base, tmp_path):
    long = row("a", "light on " * 20, "b", "light off")
    whole = found(base, tmp_path, *GOOD, long).check.lengths.tolist()
    checked = found(base, tmp_path, *GOOD, long, ask=Ask(max_length=40))
    c = checked.check
    assert (checked.max_length, c.cut, c.lost_turns, c.lost_ends) == (40, 1, 1, 1)
    assert c.lost_tokens == whole[3] - 40
    assert c.lengths.tolist() == whole  # what rows have, not what is left of them
    assert c.warnings == (
        "1 answer left out whole: the rows are longer than max_length",
        "1 answer cut before the end: the model learns to break off there",
    )
    assert c.summary == (
        f"chat (4), {c.tokens - c.lost_tokens:,} tokens, {c.loss_share:.1%} of them learned; "
        f"cut: 1 row, by {c.lost_tokens} tokens, 1 whole answer and the end of 1"
    )
    assert found(base, tmp_path, *GOOD, ask=Ask(max_length=10_000)).max_length == base.context


def test_a_cut_conversation_may_begin_with_an_empty_answer(base, tmp_path):
    rows = [row("a", empty, "b", "light on " * 20, "c", "light off") for empty in ("", " \n")]
    c = found(base, tmp_path, *GOOD, *rows, ask=Ask(max_length=60)).check
    assert (c.rows, c.cut, c.lost_turns, c.lost_ends, c.empty, c.left_out) == (5, 2, 2, 2, 2, 0)


def test_masked_labels_stop_a_run(base, tmp_path):
    rows = [SILENT, {"input_ids": [5, 6, 7], "labels": [-100] * 3}, {"input_ids": [5, 6], "labels": [5, -100]}]
    c = found(base, tmp_path, *rows).check
    assert c.faults == ("no row has a token to learn: all labels are masked",)
    with pytest.raises(DataError) as caught:
        c.raise_faults()
    assert caught.value.what == c.faults[0]
    assert caught.value.why.startswith("message weights, labels or max_length leave nothing to learn")
    assert "edgelora data check" in caught.value.fix
    assert found(base, tmp_path, *rows, GOOD[0]).check.faults == ()


def test_training_counts_the_same(base, tmp_path):
    path = write(tmp_path / "rows.jsonl", *GOOD, GOOD[0], SILENT)
    tally = Tally(base.tokenizer)
    data = load_examples([path], Encoder(base), Options(on_row=tally.add))
    c, other = tally.result(), check_data(base, [path]).check
    assert c.as_dict() == other.as_dict()
    assert (c.rows - c.left_out, c.loss_tokens) == (len(data), sum(e.n_loss_tokens for e in data))


def test_pairs_and_rated_rows(base, tmp_path):
    pairs = [{"prompt": "a", "chosen": "light on", "rejected": "light off<|im_end|>"}] * 2
    c = found(base, tmp_path, *pairs).check
    assert (c.formats, c.duplicates, c.special) == ({"preference": 2}, 1, 2)
    rated = [{"prompt": "a", "completion": "light on", "label": True}]
    assert found(base, tmp_path, *rated).check.formats == {"kto": 1}
    with pytest.raises(DataError) as caught:
        found(base, tmp_path, *pairs, *rated)
    assert caught.value.what == f"{tmp_path / 'rows.jsonl'}:3: a row of the format kto"
    assert caught.value.why == "the first are rows with `chosen` and `rejected`: no run learns from both"
    assert caught.value.fix == "put these rows into a file of their own"


def test_it_tells_how_far_it_is(base, tmp_path):
    rows, events = [row("a", str(i)) for i in range(401)], []
    lines = "\n".join(json.dumps(one) for one in rows).encode()
    files = {"a.jsonl": lines, "a.jsonl.gz": gzip.compress(lines), "a.json": json.dumps(rows).encode()}
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
        check_data(base, [tmp_path / name], on_progress=events.append)
    assert [(e.stage, e.step, e.total) for e in events] == [("check", n, 401) for n in (200, 400)] * 3


def test_several_files(base, tmp_path):
    paths = [write(tmp_path / f"{n}.jsonl", *GOOD) for n in (1, 2)]
    c = check_data(base, paths).check
    assert (c.rows, c.duplicates) == (6, 3)
    assert c.named["duplicates"][0] == f"{tmp_path / '2.jsonl'}:1"


@pytest.mark.parametrize("lengths", [[5], [5, 5], [1, 100], list(range(7, 31)), [3, 1000, 3, 17]])
def test_the_histogram_holds_every_row_once(lengths):
    bars = histogram(np.array(lengths))
    assert len(bars) <= 12
    assert sum(n for _, _, n in bars) == len(lengths)
    assert all(n == sum(low <= length <= high for length in lengths) for low, high, n in bars)
    assert histogram(np.array([], np.int64)) == []


# -- the preview and the command ----------------------------------------------------------------------------------


def test_the_preview_is_what_the_model_sees(base, tmp_path):
    (shown,) = found(base, tmp_path, *GOOD, ask=Ask(preview=1)).shown
    (parts,) = shown.examples
    assert "".join(part.text for part in parts) == (
        "<|im_start|>user\nturn on the light<|im_end|>\n<|im_start|>assistant\nlight on<|im_end|>\n"
    )
    assert [part.text for part in parts if part.learned] == ["light on<|im_end|>"]
    (document,) = found(base, tmp_path, {"text": "größe"}, ask=Ask(preview=1)).shown[0].examples
    assert [part.learned for part in document] == [False, True]  # nothing comes before the first token


def run(*arguments):
    return CliRunner().invoke(command.app, ["check", *map(str, arguments)])


def test_the_command(base, tmp_path):
    rows = write(tmp_path / "rows.jsonl", *GOOD, GOOD[0], {"text": "Once <|im_end|>\x1b[31m upon"})
    valid = write(tmp_path / "valid.jsonl", GOOD[1])
    done = run(rows, "--base", base.path, "--valid", valid, "--preview", 5, "--max-length", 200)
    assert done.exit_code == 0, done.output
    assert "format    chat (4), text (1)" in done.output
    assert "rows      5, held-out 1" in done.output
    assert re.search(r"tokens    \d+, of which \d+\.\d% are learned", done.output)
    assert "turn on the light<|im_end|>\n<|im_start|>assistant\n⟦light on<|im_end|>⟧\n" in done.output
    assert "! 1 row the same as an earlier one" in done.output
    assert "! 1 row that the held-out data have too" in done.output
    assert "\x1b" not in done.output
    assert "█" in done.output


def test_the_command_takes_files_as_training_does(base, tmp_path):
    rows = write(tmp_path / "rows.jsonl", *GOOD)
    plain, weighted = (run(f"{rows}{weight}", "--base", base.path, "--json") for weight in ("", ":0.5"))
    assert weighted.exit_code == 0, weighted.output
    assert json.loads(weighted.stdout) == json.loads(plain.stdout)
    refused = run(f"{rows}:0", "--base", base.path)
    assert isinstance(refused.exception, ConfigError)
    assert refused.exception.what == f"the weight of {rows} is 0, it must lie between 0 and 1000"


def test_the_command_refuses_a_format_that_is_none(base, tmp_path):
    done = run(write(tmp_path / "rows.jsonl", *GOOD), "--base", base.path, "--data-format", "chatt")
    assert isinstance(done.exception, ConfigError)
    assert done.exception.what == "the data format chatt, did you mean chat?"


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="the system names no pipes")
def test_the_command_reads_a_pipe_once(base, tmp_path):
    rows = write(tmp_path / "rows.jsonl", *GOOD)
    end, start = os.pipe()
    with os.fdopen(end):
        with os.fdopen(start, "wb") as pipe:
            pipe.write(rows.read_bytes())  # less than a pipe holds
        done = run(f"/dev/fd/{end}", "--base", base.path, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads(run(rows, "--base", base.path, "--json").stdout)


def test_the_command_as_json(base, tmp_path):
    rows = write(tmp_path / "rows.jsonl", *GOOD)
    done = run(rows, "--base", base.path, "--json", "--preview", 1)
    found = json.loads(done.stdout)
    assert (found["rows"], found["formats"], found["faults"], found["warnings"]) == (3, {"chat": 3}, [], [])
    assert sum(n for _, _, n in found["lengths"]) == 3
    assert found["preview"][0]["examples"][0][1] == ["light on<|im_end|>", True]


def test_the_command_refuses_what_a_run_would_refuse(base, tmp_path):
    rows = write(tmp_path / "rows.jsonl", SILENT)
    done = run(rows, "--base", base.path)
    assert isinstance(done.exception, DataError)
    assert "rows      1" in done.output


@pytest.mark.parametrize("name", ["intent", "sql", "math", "general"])
def test_real_data(base, shared_data, name):
    path = shared_data / "datasets" / f"{name}.train.jsonl"
    valid = shared_data / "datasets" / f"{name}.valid.jsonl"
    c = check_data(base, [path], valid if valid.exists() else None, Ask(max_length=256)).check
    assert c.rows == len(path.read_text(encoding="utf-8").splitlines())
    assert (c.faults, c.overlap, c.special) == ((), 0, 0)  # the splits are disjoint (PROVENANCE.md)
    assert 0 < c.loss_share < 1
