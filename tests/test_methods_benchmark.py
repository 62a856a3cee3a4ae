"""The comparison of benchmarks/methods.py: all methods have their runs, and what is said of claims follows a rule."""

from __future__ import annotations

import json
import math
import random
from typing import get_args

import pytest
from conftest import ROOT

from edgelora.config import Method

RESULTS = ROOT / "benchmarks" / "results" / "methods.json"


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """Lets `learning.*` and `study.*` be imported, as they are when a benchmark runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield


def run(loss, losses=(), n=4, **facts):
    """A result whose rows all have this loss."""
    made_up = {"rank": 16, "alpha": 32.0, "learning_rate": 1e-3, "peak_bytes": 10**9, "trained": 5, "held": "blocks"}
    made_up |= {"artefact": "GGUF", "artefact_bytes": 10**6, "skipped": 0}
    return {**made_up, "loss": loss, "nll": [2 * loss] * n, "tokens": [2] * n, "losses": list(losses), **facts}


def runs(ends, **more):
    """By task and seed: results with these losses, one for each seed."""
    return {task: {seed: run(loss, **more) for seed, loss in enumerate(ends)} for task in ("extract", "intent")}


def done(jobs, loss):
    """Results of all jobs, a training's as `loss` says of its key."""
    return {key: run(loss(key), [loss(key)] * 40, valid_loss=loss(key)) for job in jobs for key in job.makes}


def test_every_method_has_a_row_of_its_own():
    from learning.rows import SEEDS, rows

    found = rows()
    assert {row.method for row in found} == set(get_args(Method))
    assert len({row.name for row in found}) == len(found)
    assert not any("/" in row.name for row in found)  # they stand in keys
    assert len(SEEDS) == 3


def test_the_comparison_comes_to_its_end_from_wherever_it_was_stopped():
    from learning.jobs import Training, plan
    from learning.rows import rows
    from study.jobs import ready

    draw, found = random.Random(0), {}
    while jobs := list(ready(plan(found), found, ())):
        job = jobs[draw.choice([0, -1])]
        for key in job.makes:
            factor = Training.read(key).factor if job.kind == "train" else 1.0
            broken = key.startswith("train/") and Training.read(key).row == "vera"
            found[key] = {"failed": "not finite"} if broken else {"loss": factor, "valid_loss": factor}
    assert found.keys() == {key for job in plan(found, guess=True) for key in job.makes}
    trainings = [Training.read(key) for key in found if key.startswith("train/")]
    ends = {t.row: t.factor for t in trainings if t.task == "intent"}
    assert ends == {row.name: 1 / 81 for row in rows() if row.name != "vera"}  # the last one; and none that failed
    assert {t.seed for t in trainings if t.row == "dora"} == {0, 1, 2}
    assert {t.seed for t in trainings if t.row == "bitfit"} == {0}


@pytest.mark.parametrize(
    ("best", "beyond"),
    [
        (1.0, []),
        (3.0, [9.0]),
        (9.0, [9.0, 27.0]),
        (27.0, [9.0, 27.0, 81.0]),
        (1000.0, [9.0, 27.0, 81.0]),
        (1 / 27, [1 / 9, 1 / 27, 1 / 81]),
    ],
)
def test_rates_are_tried_beyond_until_the_best_is_not_at_the_edge(best, beyond):
    from learning.jobs import Training, check, chosen, tried
    from learning.rows import FACTORS, named

    row, found, order = named("bitfit"), {}, []
    while new := [factor for factor in tried(found, row) if factor not in order]:
        assert chosen(found, row) is None  # before all were tried
        order += new
        found |= {check(row, factor).key: {"valid_loss": abs(math.log(factor / best))} for factor in new}
    assert order == [*FACTORS, *beyond]
    assert chosen(found, row) == min(order, key=lambda factor: abs(math.log(factor / best)))
    assert [Training.read(key).factor for key in found] == order


def test_what_breaks_down_is_the_edge():
    from learning.jobs import check, chosen, tried
    from learning.rows import FACTORS, named

    row = named("bitfit")
    found = {check(row, factor).key: {"valid_loss": 1 / factor} for factor in (*FACTORS, 9.0)}
    found[check(row, 27.0).key] = {"failed": "not finite"}
    assert (chosen(found, row), tried(found, row)) == (9.0, (*FACTORS, 9.0, 27.0))


def test_the_main_rows_are_the_first_table():
    from learning.jobs import Training, plan
    from learning.rows import MAIN

    first = [key for job in plan({}) for key in job.makes if key.startswith("train/")][: len(MAIN)]
    assert [Training.read(key).row for key in first] == [row.name for row in MAIN]


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ((0.79, 0.80, 0.81), "confirmed here"),
        ((1.20, 1.20, 1.21), "not confirmed"),
        ((0.999, 1.0, 1.001), "not confirmed"),  # whatever it gains is less than the margin
        ((0.5, 1.0, 1.4), "not decidable at this size"),
        ((0.8, 0.8), "not decidable yet"),  # a seed is missing
    ],
)
def test_a_claim_is_decided_by_its_whole_interval(losses, verdict):
    from learning.claims import CLAIMS, read

    claim = next(claim for claim in CLAIMS if claim.what == "DoRA learns better than LoRA")
    assert read(claim, {"lora": runs((1.0, 1.0, 1.0)), "dora": runs(losses)})["verdict"] == verdict


def test_a_claim_is_open_until_both_tasks_are_done():
    from learning.claims import CLAIMS, OPEN, read

    half = {"extract": runs((0.5, 0.5, 0.5))["extract"]}
    assert read(CLAIMS[0], {"lora": runs((1.0, 1.0, 1.0)), "dora": half})["verdict"] == OPEN
    assert read(CLAIMS[0], {})["verdict"] == OPEN


def test_a_start_is_compared_by_the_steps_until_there():
    from learning.claims import at

    slow, fast = [2.0] * 24, [1.0] * 8 + [2.0] * 16
    a, b = runs((1.0,) * 3, losses=slow), runs((1.0,) * 3, losses=fast)
    assert at(8)(a, b).value == pytest.approx(-1.0)
    assert at(16)(a, b).value == pytest.approx(0.0)


def test_an_interval_over_runs_is_students_with_the_seeds_of_all_tasks():
    from learning.claims import over_runs

    a, b = runs((1.0, 1.0, 1.0)), runs((1.1, 1.2, 1.3))
    for of_task in b.values():
        for result in of_task.values():
            result["losses"] = [result["loss"]]
    for of_task in a.values():
        for result in of_task.values():
            result["losses"] = [1.0]
    found = over_runs(a, b, lambda x, y: y[0] - x[0])
    half = 2.776 * 0.1 / 6**0.5  # t of 4 degrees of freedom · standard deviation of a seed / √6 of them
    assert found.value == pytest.approx(0.2)
    assert found.interval_95 == pytest.approx((0.2 - half, 0.2 + half))


def test_a_speed_is_steps_over_steps():
    from learning.claims import faster, speed

    falling = [40.0 - step for step in range(40)]  # its last mean is of the steps 33 to 40
    twice = [40.0 - 2 * step for step in range(40)]
    found = speed(runs((1.0,) * 3, losses=falling), runs((1.0,) * 3, losses=twice))
    assert found.value == pytest.approx(
        math.log(40 / 23)
    )  # of the steps 33 to 40 the mean is 4.5, and of 16 to 23 it is 3
    assert faster(found) == "confirmed here"
    never = speed(runs((1.0,) * 3, losses=falling), runs((1.0,) * 3, losses=[50.0] * 40))
    assert (never.value, faster(never)) == (0.0, "not confirmed")


def test_a_row_is_shown_at_its_best_learning_rate():
    from learning.jobs import Training
    from learning.rows import named
    from learning.summary import factor_of, runs_of

    found = {
        Training("extract", "dora", 0, factor).key: run(1.0, valid_loss=loss)
        for factor, loss in ((1.0, 0.5), (3.0, 0.4), (1 / 3, 0.6))
    }
    row = named("dora")
    assert factor_of(found, row) == 3.0  # the best so far, though one beyond is still to be tried
    assert list(runs_of(found, row)) == ["extract"]
    found[Training("extract", "dora", 0, 9.0).key] = {"failed": "not finite"}
    assert factor_of(found, row) == 3.0


def test_a_partial_page_says_so_and_a_whole_one_does_not():
    from learning.jobs import plan
    from learning.page import written
    from learning.summary import summary
    from study.jobs import ready
    from study.pool import State

    found = done(plan({})[:20], lambda key: 1.0 + len(key) % 7 / 10)
    page = written(json.loads(json.dumps(summary(found, State(len(found), 999, [], 3600.0, 0.0)))))
    assert "It is partial" in page
    assert "not decidable yet" in page
    while jobs := list(ready(plan(found), found, ())):
        found |= done(jobs, lambda key: 1.0 + len(key) % 7 / 10)
    state = State(len(found), len(found), [], 3600.0, 0.0)
    page = written(json.loads(json.dumps(summary(found, state))))
    assert "It is whole" in page
    assert "not decidable yet" not in page
    for method in get_args(Method):
        assert f"| {method}" in page or method in ("loraplus", "rslora")


def test_what_could_not_be_trained_is_on_the_page():
    from learning.jobs import check
    from learning.page import written
    from learning.rows import named
    from learning.summary import summary
    from study.pool import State

    found = {check(named("bitfit"), 1.0).key: {"failed": "no biases (a reason)"}}
    page = written(json.loads(json.dumps(summary(found, State(1, 2, [], 0.0, 0.0)))))
    assert "bitfit failed: no biases (a reason)" in page


@pytest.mark.skipif(not RESULTS.exists(), reason="the comparison has not been recorded yet")
def test_the_page_is_what_was_recorded():
    from learning.page import written

    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert written(json.loads(RESULTS.read_text(encoding="utf-8"))) == text, "run: benchmarks/methods.py --page"
