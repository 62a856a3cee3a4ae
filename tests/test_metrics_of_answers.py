"""When an answer counts as right, whether two models differ, and multiple choice by likelihood."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from edgelora.base.model import open_base
from edgelora.errors import ConfigError, DataError
from edgelora.evaluate import paired
from edgelora.evaluate.choices import CUSTOMS, alternatives, parse_choice, read_choices, score_choices
from edgelora.evaluate.metrics import METRICS, choose_metric, pattern, same_json, same_label, same_number

# -- right and wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ('{"b": [1, 2], "a": "x"}', '{"a":"x","b":[1,2]}', True),
        ('{"a": 1.0}', '{"a": 1}', True),
        ('{"a": true}', '{"a": 1}', False),
        ("[2, 1]", "[1, 2]", False),
        ('```json\n{"a": 1}\n```', '{"a": 1}', True),
        ('Sure: {"a": 1}', '{"a": 1}', False),
        ("null", "null", True),
        ('{"a": NaN}', '{"a": NaN}', False),
        ("[" * 100_000, "[]", False),
    ],
)
def test_json_is_compared_as_a_value(answer, reference, right):
    assert same_json(answer, reference) is right


@pytest.mark.parametrize(
    ("answer", "right"),
    [("6 * 7 = 42\n#### 42", True), ("#### 41\n#### 42.0", True), ("####1,042", False), ("42", False),
     ("#### x", False), ("#### - ", False)],
)  # fmt: skip
def test_the_last_marked_number_counts(answer, right):
    assert same_number(answer, "so\n#### 42") is right


def test_numbers_with_commas_are_numbers():
    assert same_number("#### 1,234,567", "#### 1234567")


@pytest.mark.parametrize(("answer", "right"), [("Weather.", True), (" 'weather' ", True), ("the weather", False)])
def test_labels_forgive_case_and_signs(answer, right):
    assert same_label(answer, "weather") is right


def test_a_pattern_compares_its_group():
    metric = pattern(r"Answer: (\w+)")
    assert metric.right("I think.\nAnswer: B, since", "Answer: B")
    assert not metric.right("Answer: C", "Answer: B")
    assert not metric.right("B", "Answer: B")


@pytest.mark.parametrize(
    ("references", "name"),
    [
        (['{"a": 1}', "[]"], "json"),
        (["1 + 1\n#### 2", "#### 3"], "number"),
        (["on", "off", "on", "on", "off", "off"], "label"),
        (["one", "two", "three"], "exact"),
        (["1", "2"], "exact"),  # valid JSON, but nobody means it
    ],
)
def test_the_metric_that_fits_every_reference_is_taken(references, name):
    found, metric = choose_metric(references)
    assert (found, metric) == (name, METRICS[name])
    assert all(metric.right(text, text) for text in references)


@pytest.mark.parametrize("name", ["extract", "intent", "math", "sql"])
def test_real_tasks_are_recognised(shared_data, name):
    rows = (shared_data / "datasets" / f"{name}.test.jsonl").read_text(encoding="utf-8").splitlines()
    references = [json.loads(row)["messages"][-1]["content"] for row in rows]
    assert choose_metric(references)[0] == {"extract": "json", "intent": "label", "math": "number"}.get(name, "exact")


def test_a_metric_that_could_never_be_met_is_refused():
    with pytest.raises(DataError) as e:
        choose_metric(["#### 1", "two"], "number")
    assert e.value.what == "row 2: its answer cannot be scored by number after ####"
    with pytest.raises(ConfigError, match="there is none of that name"):
        choose_metric(["a"], "bleu")
    with pytest.raises(ConfigError, match="no regular expression"):
        choose_metric(["a"], regex="(")


# -- two models ------------------------------------------------------------------------------------------------------


# twice the chance of so few heads or fewer in as many throws: 2 · 1/32, 2 · (1 + 10)/1024, 2 · (1 + 14 + 91)/16384
@pytest.mark.parametrize(
    ("only_a", "only_b", "expected"),
    [(0, 0, 1), (0, 5, 0.0625), (9, 1, 22 / 1024), (3, 3, 1), (2, 12, 212 / 16384), (900, 1100, 8.54e-6)],
)
def test_mcnemar_is_the_binomial_test(only_a, only_b, expected):
    a = [True] * only_a + [False] * only_b + [True, False] * 4
    b = [False] * only_a + [True] * only_b + [True, False] * 4
    assert paired.mcnemar(a, b) == pytest.approx(expected, rel=1e-2)


def test_pairing_finds_what_two_intervals_hide():
    """b answers two rows of a hundred more, and no row worse: 0.5 against 0.6 alone would say nothing."""
    a = [i % 2 == 0 for i in range(100)]
    b = [right or i in range(1, 20, 2) for i, right in enumerate(a)]
    found = paired.of_shares(a, b)
    assert found.value == pytest.approx(0.1)
    assert found.is_clear
    low, high = found.interval_95
    assert 0 < low < 0.1 < high < 0.2
    same = paired.of_shares(a, a)
    assert (same.value, same.interval_95, same.p_value) == (0.0, (0.0, 0.0), 1.0)
    assert not same.is_clear


def test_the_interval_of_a_weighted_mean_covers_it():
    draw, covered = np.random.default_rng(0), 0
    for _ in range(40):
        weights = draw.integers(1, 9, 60).astype(float)
        shift = draw.normal(0.3, 1.0, 60) * weights
        found = paired.of_means(np.zeros(60), shift, weights)
        low, high = found.interval_95
        assert low < found.value < high
        covered += low <= 0.3 <= high
    assert covered >= 33  # of 40 at 95 %: fewer than this in one of 500 tries


def test_other_rows_are_no_pair():
    with pytest.raises(ValueError, match="not the same rows"):
        paired.of_shares([True], [True, False])


# -- multiple choice -------------------------------------------------------------------------------------------------

ARC = {"question": "What falls?", "choices": ["rain", "a light drizzle of rain"], "answer": 1}
WINOGRANDE = {
    "contexts": ["The cup broke the floor, so the cup", "so the floor"],
    "continuation": "was hard.",
    "answer": 0,
}


def test_rows_of_both_kinds_are_read():
    arc, winogrande = parse_choice(ARC), parse_choice(WINOGRANDE)
    assert arc.contexts == ("Question: What falls?\nAnswer:",) * 2
    assert arc.endings == ("rain", "a light drizzle of rain")
    assert winogrande.endings == ("was hard.",) * 2


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({**ARC, "answer": 2}, "`answer` is 2, not a number from 0 to 1"),
        ({**ARC, "answer": True}, "`answer` is True"),
        ({**ARC, "choices": ["one"]}, "`choices` is no list of two texts or more"),
        ({**ARC, "choices": ["one", ""]}, "`choices` is no text, or an empty one"),
        ({"question": "x", "choice": ["a", "b"], "answers": 0}, "`choice` looks like `choices`"),
    ],
)
def test_broken_rows_say_what_is_wrong(row, why):
    with pytest.raises(DataError) as e:
        read_choices([ARC, row], "file.jsonl")
    assert e.value.what == "file.jsonl:2: this row is no multiple choice"
    assert why in e.value.why


def test_what_is_scored_are_the_endings_tokens(tiny):
    tokenizer = open_base(tiny.path).tokenizer
    for choice in (parse_choice(ARC), parse_choice(WINOGRANDE)):
        for context, ending, found in zip(
            choice.contexts, choice.endings, alternatives(choice, tokenizer), strict=True
        ):
            assert tokenizer.decode(list(found.ids)) == f"{context} {ending}"
            assert tokenizer.decode(list(found.ids[found.first :])) == f" {ending}"


def test_each_custom_divides_by_its_own_length(tiny):
    tokenizer = open_base(tiny.path).tokenizer
    choice = parse_choice(ARC)
    short, long = alternatives(choice, tokenizer)
    n_short, n_long = len(short.ids) - short.first, len(long.ids) - long.first
    characters = [len(ending) for ending in choice.endings]
    for per_short, per_long in itertools.product([-1.0, -2.0], [-1.5, -0.1]):
        values = [np.full(n_short, per_short), np.full(n_long, per_long)]
        found = score_choices([choice], tokenizer, lambda _, values=values: values)
        sums = per_short * n_short, per_long * n_long
        assert found.right["sum"] == [sums[1] > sums[0]]
        assert found.right["per_token"] == [per_long > per_short]
        assert found.right["per_character"] == [sums[1] / characters[1] > sums[0] / characters[0]]
        assert found.chance == 0.5
        assert set(found.right) == set(CUSTOMS)


def test_real_files_are_read(shared_data):
    for name, n in (("arc_easy", 500), ("winogrande", 400)):
        rows = (shared_data / "evals" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(read_choices(map(json.loads, rows), name)) == n
