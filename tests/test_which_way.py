"""The study of benchmarks/which_way.py: what there is to do follows from what is done, and its page from figures."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT

from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.evaluate.paired import of_means

SUMMARY = ROOT / "benchmarks" / "results" / "which-way.json"


@pytest.fixture(scope="module", autouse=True)
def study():
    """Lets `study.*` be imported, as it is when a benchmark runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield


def run(loss, right=(1, 0), tokens=(2, 3)):
    """A result whose rows all have this loss."""
    return {"loss": loss, "nll": [loss * n for n in tokens], "tokens": list(tokens), "right": list(right)}


def test_a_study_comes_to_its_end_from_wherever_it_was_stopped(monkeypatch):
    from study import jobs as module
    from study.jobs import Cell, plan, ready
    from study.ways import ways

    monkeypatch.setattr(module, "SEEDS", (0,))
    draw, found = random.Random(0), {}
    while jobs := list(ready(plan(found, ways()), found, ())):
        job = jobs[0]
        assert all(key in found for key in job.needs)
        assert not set(job.makes) & found.keys()
        for key in job.makes[: draw.randint(1, len(job.makes))]:  # a kill leaves the rest to be done
            rate = Cell.read(key).rate if job.kind == "score" else 0.0
            found[key] = {"loss": abs(rate - 1.5e-4)}
    assert found.keys() == {key for job in plan(found, ways(), guess=True) for key in job.makes}
    assert {key.split("/")[-1] for key in found if key.startswith("test/")} == {"0.00015"}  # beyond the edge


def test_what_is_being_made_is_not_begun_twice():
    from study.jobs import plan, ready
    from study.ways import ways

    found = {key: {} for job in plan({}, ways()) if job.kind == "base" for key in job.makes}
    first, second, *_ = ready(plan(found, ways()), found, ())
    assert next(ready(plan(found, ways()), found, first.makes)) == second


def test_a_rate_at_which_training_broke_down_is_not_taken():
    from study.jobs import check, chosen_rate
    from study.ways import RATES, WAYS

    keys = [check(WAYS[3], "Q3_K_M", rate).key for rate in RATES]
    found = dict(zip(keys, ({"loss": 3.0}, {"loss": 2.0}, {"failed": "not finite"}), strict=True))
    assert chosen_rate(found, WAYS[3], "Q2_K") == RATES[1]
    assert chosen_rate({keys[1]: {"loss": 2.0}}, WAYS[3], "Q2_K") is None


def test_a_line_that_a_kill_cut_off_is_done_again(tmp_path):
    from study.room import RESULTS, Room

    room = Room(tmp_path, tmp_path, tmp_path)
    room.keep("base/F16", {"bytes": 1})
    with (tmp_path / RESULTS).open("a") as file:
        file.write('{"key": "base/Q2')
    room.keep("base/Q8_0", {"bytes": 2})
    assert room.found() == {"base/F16": {"bytes": 1}, "base/Q8_0": {"bytes": 2}}


def test_an_interval_of_three_seeds_is_students():
    from study.reading import LOSS, difference

    a = {"extract": {seed: run(1.0) for seed in range(3)}}
    b = {"extract": {seed: run(loss) for seed, loss in enumerate((1.1, 1.2, 1.3))}}
    found = difference(a, b, LOSS)
    half = 4.303 * 0.1 / 3**0.5  # t of 2 degrees of freedom · standard deviation / √3; rows differ by nothing
    assert found.value == pytest.approx(0.2)
    assert found.interval_95 == pytest.approx((0.2 - half, 0.2 + half))
    assert (found.runs, found.of_seeds, found.is_clear) == (3, True, False)


def test_an_interval_of_one_seed_is_that_of_the_rows():
    from study.reading import LOSS, difference

    draw, tokens = random.Random(0), [3] * 40
    nll = {side: [draw.uniform(1, 5) for _ in tokens] for side in "ab"}
    a, b = ({"sql": {0: {"loss": sum(nll[side]) / 120, "nll": nll[side], "tokens": tokens}}} for side in "ab")
    found, rows = difference(a, b, LOSS), of_means(nll["a"], nll["b"], tokens)
    assert found.value == pytest.approx(rows.value)
    assert found.interval_95 == pytest.approx(rows.interval_95, abs=0.01)
    assert not found.of_seeds


def test_ways_are_compared_on_what_all_of_them_did():
    from study.summary import complete

    one, two = run(1.0), run(2.0)
    found = complete({1: {"sql": {0: one, 1: one}, "intent": {0: one}}, 4: {"sql": {1: two}}})
    assert found == {1: {"sql": {1: one}}, 4: {"sql": {1: two}}}


def test_a_training_that_broke_down_is_told():
    from study.summary import broken

    steady = {"sql": {0: run(0.1), 1: run(0.12), 2: run(0.3)}}
    found = broken({1: steady, 5: {"sql": steady["sql"] | {2: run(1.7)}}})
    assert found == [{"way": 5, "task": "sql", "seed": 2, "loss": 1.7, "median": 0.12}]


def test_a_padded_model_is_the_same_function(tiny, tmp_path):
    """Twice as wide, with the same dithering: the same hidden states, and zeros behind them."""
    from peers.padded import write_dithered

    ids, found = torch.arange(12), {}
    for name, width in (("narrow", None), ("wide", 512)):
        write_dithered(tiny.path, tmp_path / name, width)
        with torch.no_grad():
            found[name] = build_decoder(open_base(tmp_path / name))(ids, ids, [0, 12])  # (T, d)
    torch.testing.assert_close(found["wide"][:, :256], found["narrow"], atol=1e-5, rtol=0)
    assert not found["wide"][:, 256:].any()


def test_dithering_leaves_the_grid_by_half_a_step_at_most():
    from peers.padded import dithered

    grid = np.random.default_rng(0).integers(-8, 8, (4, 64)).astype(np.float32) / 4
    moved = dithered(grid, np.random.default_rng(1)) - grid
    assert 0.1 < np.abs(moved).max() <= 0.125
    assert len(np.unique(moved)) > 200


def test_nothing_is_called_better_whose_interval_holds_zero():
    from study.page import verdict

    assert verdict({"value": -0.1, "is_clear": False}) == "no difference"
    assert verdict({"value": -0.1, "is_clear": True}) == "better"
    assert verdict({"value": 0.1, "is_clear": True}) == "worse"


def against_merging(**values: float) -> dict[str, dict[str, Any]]:
    """Ways by their numbers, each clearly so much above merging's loss."""
    ways = {name.removeprefix("way"): value for name, value in values.items()}
    return {n: {"loss_against_usual": {"value": v, "is_clear": v != 0.0}} for n, v in ways.items()}


def test_a_conclusion_follows_from_what_is_clear():
    from study.page import conclusion

    kept_live = {"b": 5, "a": 4, "loss": {"value": 0.1, "is_clear": True}}
    nothing = {"ways": against_merging(way1=0.0, way2=0.0, way4=0.2, way6=0.0), "questions": []}
    trained = {"ways": against_merging(way1=0.0, way4=-0.2, way6=-0.3), "questions": [kept_live]}
    matrix = {"ways": against_merging(way1=0.0, way4=0.0, way6=-0.3), "questions": [kept_live]}
    assert conclusion(nothing).startswith("No way is shown to be better than merging")
    assert conclusion(trained) == "Train over the very file that will run and keep the adapter live."
    assert conclusion(trained | {"questions": []}) == "Train over the very file that will run."
    assert conclusion(matrix).startswith("Merge, with an importance matrix")


@pytest.mark.skipif(not SUMMARY.exists(), reason="the study has not been summed up yet")
def test_the_page_is_what_was_recorded():
    from study.page import written

    text = (ROOT / "docs" / "which-way.md").read_text(encoding="utf-8")
    assert written(json.loads(SUMMARY.read_text(encoding="utf-8"))) == text, "run: which_way.py --room FOLDER --write"


@pytest.mark.skipif(not SUMMARY.exists(), reason="the study has not been summed up yet")
def test_the_readme_tells_its_figures():
    ways = json.loads(SUMMARY.read_text(encoding="utf-8"))["levels"]["Q2_K"]["ways"]
    over_it, merged, matrix = (f"{ways[number]['loss']:.2f}" for number in "416")
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"at Q2_K its loss is {over_it} nats live over it" in text
    assert f"ends at {merged}, with the task's importance matrix at {matrix}." in text
