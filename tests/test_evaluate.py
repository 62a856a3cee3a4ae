"""`edgelora eval`: a task by any metric, and multiple choice by likelihood, in llama.cpp."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import ROOT
from test_export import make_adapter

from converters.adapter_to_gguf import write_adapter_gguf
from edgelora.base.model import open_base
from edgelora.cli import run
from edgelora.errors import DataError, EngineError
from edgelora.evaluate.choices import ChoiceScore, alternatives, parse_choice, score_choices
from edgelora.evaluate.perplexity import nll_of
from edgelora.evaluate.protocols import Alternative
from edgelora.evaluate.score import RowScore, Score, Scored
from edgelora.evaluate.taken import WindowSums, choice_measure, task_measures, text_measures
from edgelora.pipeline.evaluate import is_choice_file
from edgelora.pipeline.perplexity import Run, measure
from runtime.scorer import ScoringEngine

ARC = {"question": "Which light is on?", "choices": ["the lamp", "no light at all", "it"], "answer": 1}
WINOGRANDE = {
    "contexts": ["Turn on the lamp so it", "Turn off the lamp so it"],
    "continuation": "is dark.",
    "answer": 1,
}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def task(tmp_path):
    rows = (ROOT / "examples" / "home" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    return write_lines(tmp_path / "task.jsonl", map(json.loads, rows))


# -- multiple choice -------------------------------------------------------------------------------------------------


def cold(engine: ScoringEngine, one: Alternative) -> np.ndarray:
    """log p of the scored ids of one alternative, evaluated whole and alone."""
    logits = engine.logits([one.ids], [range(one.first - 1, len(one.ids) - 1)])
    return -nll_of(logits, np.array(one.ids[one.first :]))


@pytest.mark.parametrize("n_sequences", [1, 2, 8])
@pytest.mark.parametrize("row", [ARC, WINOGRANDE], ids=["arc", "winogrande"])
def test_what_alternatives_share_is_evaluated_once_and_changes_nothing(tiny, row, n_sequences):
    base = open_base(tiny.path)
    some = alternatives(parse_choice(row), base.tokenizer)
    with ScoringEngine(base, n_ctx=256, n_sequences=n_sequences, threads=1) as engine:
        before = engine.log_p(some)
        expected = [cold(engine, one) for one in some]
        again = engine.log_p(some[::-1])[::-1]
    assert [len(part) for part in before] == [len(one.ids) - one.first for one in some]
    for found in (before, again):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-3)


def test_more_tokens_than_one_decode_takes_go_into_several(tiny):
    """The context has 64 tokens in a decode; two alternatives of 40 do not fit, nor does their beginning of 33."""
    draw = np.random.default_rng(0)
    begin = draw.integers(5, 500, 33).tolist()
    some = [Alternative((*begin, *draw.integers(5, 500, 25).tolist()), 34) for _ in range(4)]
    with ScoringEngine(open_base(tiny.path), n_ctx=64, n_sequences=1, threads=1) as engine:
        for a, b in zip(engine.log_p(some), [cold(engine, one) for one in some], strict=True):
            np.testing.assert_allclose(a, b, atol=2e-3)
        with pytest.raises(EngineError, match="65 tokens"):
            engine.log_p([Alternative((5,) * 65, 64)])


def test_multiple_choice_from_the_command_line(tiny, tmp_path, capsys):
    file = write_lines(tmp_path / "arc.jsonl", [ARC, WINOGRANDE])
    assert run(["eval", str(tiny.path), "--data", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    base = open_base(tiny.path)
    with ScoringEngine(base, n_ctx=256, n_sequences=8, threads=1) as engine:
        expected = score_choices(
            [parse_choice(ARC), parse_choice(WINOGRANDE)], base.tokenizer, lambda some: [cold(engine, o) for o in some]
        )
    assert {custom: found[custom] for custom in expected.right} == {c: expected.share(c) for c in expected.right}
    assert (found["rows"], found["chance"]) == (2, pytest.approx((1 / 3 + 1 / 2) / 2))
    assert run(["eval", str(tiny.path), "--data", str(file)]) == 0
    assert "guessing gets 41.7% right" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"question": "a", "choice": ["b", "c"], "answer": 0}, "`choice` looks like `choices`"),
        ({"question": "a", "choices": ["b", "c"], "answer": 2}, "`answer` is 2"),
        (
            {"instruction": "a", "outptu": "b"},
            "the nearest is alpaca (instruction, output), with `output` for `outptu`",
        ),
        ({"zzz": 1}, "no format has the keys of this row: zzz"),
    ],
)
def test_unknown_columns_name_the_nearest(tiny, tmp_path, capsys, row, fault):
    assert run(["eval", str(tiny.path), "--data", str(write_lines(tmp_path / "rows.jsonl", [row]))]) == 1
    assert fault in capsys.readouterr().err


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="no rows in it"):
        is_choice_file(write_lines(tmp_path / "empty.jsonl", []))


# -- a task ----------------------------------------------------------------------------------------------------------


def test_a_task_is_scored_by_the_metric_that_fits_it(tiny, task, capsys):
    assert run(["eval", str(tiny.path), "--data", str(task), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["metric"], found["right"], len(found["answers"])) == ("json", 0.0, 3)
    assert found["exact_match"] == 0.0
    assert found["first_token_s"] > 0
    assert found["switch_s"] is None
    assert run(["eval", str(tiny.path), "--data", str(task)]) == 0
    assert "equality" in capsys.readouterr().out  # the metric is named, not only "right"
    assert run(["eval", str(tiny.path), "--data", str(task), "--metric", "number"]) == 1
    assert "cannot be scored by number after ####" in capsys.readouterr().err


def test_an_adapter_is_switched_and_a_pattern_decides(tiny, task, tmp_path, capsys):
    base = open_base(tiny.path)
    adapter = tmp_path / "adapter.gguf"
    write_adapter_gguf(adapter, make_adapter(base), base, "adapter")
    words = ["eval", str(tiny.path), "--data", str(task), "--adapter", str(adapter), "--pattern", r"\{", "--json"]
    assert run(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metric"] == "pattern"
    assert 0 <= found["switch_s"] < 10


# -- as measures -----------------------------------------------------------------------------------------------------


def test_task_measures_hold_every_row():
    rows = (RowScore(True, 2.0, 4, "known"), RowScore(False, 6.0, 2, "new"), RowScore(True, 1.0, 4, "known"))
    score = Score(3, 2, 10, 9.0, (0, 1))
    found = task_measures(Scored(score, {"known": score, "new": score}, [], "json", rows))
    assert found["right"].value == pytest.approx(2 / 3)
    assert (found["loss"].value, found["loss"].rows, found["loss"].weights) == (0.9, (2.0, 6.0, 1.0), (4.0, 2.0, 4.0))
    assert (found["right/known"].value, found["loss/known"].value) == (1.0, pytest.approx(3 / 8))
    low, high = found["loss"].interval_95
    assert (low, high) == (pytest.approx(0.25), pytest.approx(3.0))  # all three rows the last, or the second
    assert found["right/new"].interval_95 is None  # of one row


def test_a_loss_that_is_no_number_has_no_interval():
    found = task_measures(Scored(Score(1, 0, 1, 1.0, (0, 1)), {}, [], "json", (RowScore(True, np.nan, 1),) * 2))
    assert np.isnan(found["loss"].value)
    assert found["loss"].interval_95 is None


def test_text_measures_are_those_of_the_whole_text(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("turn the kitchen lights on, please, and then close the blinds\n" * 12, encoding="utf-8")
    stored = tmp_path / "tiny.reference"
    measure(Run(tiny.path, text, context=64, threads=1, save=stored, top=16))
    whole = measure(Run(tiny.path, text, context=64, threads=1, against=stored))
    found = text_measures(whole.by_window)
    assert found["perplexity"].value == pytest.approx(whole.perplexity.value)
    assert found["bits_per_byte"].value == pytest.approx(whole.bits_per_byte)
    assert (found["kl"].value, found["same_top"].value) == (0.0, 1.0)  # itself, through 16 of 512 tokens: exactly
    assert set(text_measures([WindowSums(2, 8, 3.0)] * 2)) == {"perplexity", "bits_per_byte"}


def test_choice_measure_names_its_chance():
    base_right = {"sum": [False, True], "per_character": [True, True], "per_token": [True, False]}
    found = choice_measure(ChoiceScore(base_right, 0.25))
    assert (found.value, found.rows, found.chance) == (0.5, (1.0, 0.0), 0.25)
