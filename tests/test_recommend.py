"""The file that a report advises: by its rules alone, whatever is missing."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from edgelora.errors import ConfigError
from edgelora.evaluate.against import NEGLIGIBLE_NATS, against
from edgelora.evaluate.cells import NOT_MEASURED, CellResult, Measure, UsedFile
from edgelora.evaluate.measures import MEASURES, difference
from edgelora.evaluate.pareto import frontier, ranked_by
from edgelora.evaluate.recommend import Limits, recommend

N = 200


def right(n_right: int, flipped: int = 0) -> Measure:
    """Of N rows; `flipped` more of them are right that were wrong, and as many the other way."""
    rows = [1.0] * n_right + [0.0] * (N - n_right)
    for i in range(flipped):
        rows[i], rows[-1 - i] = 0.0, 1.0
    return Measure(sum(rows) / N, (sum(rows) / N - 0.05, sum(rows) / N + 0.05), tuple(rows))


def loss(mean: float, spread: float = 0.0) -> Measure:
    """`spread`: noise of the single rows, of which the mean is `mean` all the same."""
    noise = np.random.default_rng(1).normal(0, 1, N)
    rows = 10 * (mean + spread * (noise - noise.mean()))
    return Measure(mean, None, tuple(rows.tolist()), (10.0,) * N)


def cell(quant: str, megabytes: float, way: str = "merged", **fields) -> CellResult:
    speed = replace(NOT_MEASURED, generation_tokens_per_s=fields.pop("speed", 100.0), peak_bytes=fields.pop("peak", 0))
    measures = {key: fields.pop(key) for key in [*MEASURES] if key in fields}
    file = f"{quant}-{way}.gguf"
    return CellResult(way, quant, path=file, size_bytes=int(megabytes * 1e6), measures=measures, speed=speed, **fields)


def chosen(*cells: CellResult, **limits) -> str:
    return recommend(cells, Limits(**limits)).cell


F16, Q8, Q4, Q2 = (
    cell("F16", 270, right=right(186), speed=80.0),
    cell("Q8_0", 145, right=right(185, flipped=2)),
    cell("Q4_K_M", 105, right=right(182, flipped=3), speed=152.0),
    cell("Q2_K", 88, right=right(150)),
)


def test_the_smallest_that_is_not_clearly_worse_is_taken_and_the_words_say_why():
    found = recommend([F16, Q8, Q4, Q2])
    assert (found.file, found.cell) == ("Q4_K_M-merged.gguf", "Q4_K_M merged")
    # the interval is that of the paired bootstrap, which is what makes it noise
    (low, high), (least, most) = (differs(F16, other) for other in (Q4, Q2))
    assert found.why.splitlines() == [
        "Q4_K_M merged: 105.0 MB, within noise of F16 merged, the best on your task, 1.9× its speed.",
        f"Right answers 91.0% against 93.0%: −2.0 points (95 %: {low} … {high}).",
        "Take F16 merged (270.0 MB) if the best measured figure is worth its size.",
        f"Q2_K merged (88.0 MB) is smaller, but worse: right answers −18.0 points (95 %: {least} … {most}).",
    ]


def differs(a: CellResult, b: CellResult) -> list[str]:
    bounds = difference("right", a.measures["right"], b.measures["right"]).interval_95
    return [f"{100 * bound:+.1f}".replace("-", "−") for bound in bounds]


def test_a_live_adapter_is_named_beside_its_model():
    live = replace(cell("Q4_0", 92, "live", right=right(186)), files=(UsedFile("adapter", "home.gguf", "", 1),))
    assert "Ship Q4_0-live.gguf with home.gguf live over it." in recommend([live, F16]).why.splitlines()


def test_the_order_of_the_cells_does_not_matter():
    assert chosen(Q2, Q8, F16, Q4) == chosen(F16, Q8, Q4, Q2)


def test_intervals_that_overlap_hide_a_difference_that_pairs_show():
    """93 % against 85 %, ± 5 each: the intervals overlap, but where one row changed it was always for the worse."""
    better, worse = cell("Q8_0", 145, right=right(186)), cell("Q3_K_M", 95, right=right(170))
    assert better.measures["right"].interval_95[0] < worse.measures["right"].interval_95[1]
    assert chosen(better, worse) == "Q8_0 merged"


@pytest.mark.parametrize(
    ("intervals", "taken"), [(((0.9, 0.96), (0.8, 0.91)), "Q3_K_M"), (((0.9, 1), (0, 0.8)), "F16")]
)
def test_without_the_same_rows_intervals_apart_are_a_difference(intervals, taken):
    a, b = (Measure(sum(pair) / 2, pair) for pair in intervals)
    assert chosen(cell("F16", 270, right=a), cell("Q3_K_M", 95, right=b)) == f"{taken} merged"


def test_of_equals_the_smallest_then_the_fastest():
    same = right(180)
    cells = [cell("F16", 270, right=same), cell("Q5_0", 110, right=same), cell("Q5_1", 110, right=same, speed=120.0)]
    assert chosen(*cells) == "Q5_1 merged"
    assert chosen(cells[0], cells[1], replace(cells[1], way="imatrix")) == "Q5_0 merged"  # the simpler way


@pytest.mark.parametrize(
    ("shift", "spread", "taken", "said"),
    [
        (NEGLIGIBLE_NATS * 0.9, 0.0, "Q4_K_M", "less than 0.02 nats a token behind"),  # clear, and too small to matter
        (NEGLIGIBLE_NATS * 1.1, 0.0, "F16", "the best on your task"),
        (NEGLIGIBLE_NATS * 5, 2.0, "Q4_K_M", "within noise of"),  # large, and not clear
    ],
)
def test_a_clear_difference_in_loss_may_be_too_small_to_matter(shift, spread, taken, said):
    cells = [cell("F16", 270, loss=loss(1.0)), cell("Q4_K_M", 105, loss=loss(1.0 + shift, spread))]
    found = recommend(cells)
    assert found.cell == f"{taken} merged"
    assert said in found.why


def test_loss_sees_what_few_right_answers_cannot():
    """Ten rows cannot show that one answer less is worse; their loss can."""
    few = Measure(0.9, None, (1.0,) * 9 + (0.0,)), Measure(0.8, None, (1.0,) * 8 + (0.0,) * 2)
    cells = [cell("F16", 270, right=few[0], loss=loss(0.5)), cell("Q2_K", 88, right=few[1], loss=loss(2.0))]
    assert chosen(*cells) == "F16 merged"
    assert chosen(*(replace(c, measures={"right": c.measures["right"]}) for c in cells)) == "Q2_K merged"


def test_where_the_tests_disagree_the_better_file_is_taken():
    """Five rows of a hundred lost and none won: the interval is below 0, McNemar's exact p is 2 / 2^5 = 0.0625."""
    a, b = (Measure(n / 100, None, (1.0,) * n + (0.0,) * (100 - n)) for n in (96, 91))
    best, other = cell("Q8_0", 145, right=a), cell("Q4_K_M", 105, right=b)
    (found,) = against(best, other, ["right"])
    assert found.p_value == 0.0625
    assert found.interval_95[1] < 0
    assert (found.is_worse, found.verdict) == (True, "probably worse")
    assert chosen(best, other) == "Q8_0 merged"


def test_perplexity_is_compared_in_nats():
    a, b = Measure(20.0, None, (3.0,) * 8, (1.0,) * 8), Measure(20.3, None, (3.015,) * 8, (1.0,) * 8)
    best, other = cell("F16", 270, perplexity=a), cell("Q8_0", 145, perplexity=b)
    (found,) = against(best, other, ["perplexity"])
    assert found.change == pytest.approx(0.015)
    assert chosen(best, other) == "Q8_0 merged"
    (alone,) = against(best, replace(other, measures={"perplexity": Measure(20.3)}), ["perplexity"])
    assert alone.change == pytest.approx(math.log(20.3 / 20.0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_never_ranked(value):
    broken = cell("Q2_K", 88, loss=Measure(value))
    found = recommend([cell("F16", 270, loss=loss(1.0)), broken])
    assert found.cell == "F16 merged"
    assert "Q2_K merged (no number came out)" in found.why
    assert recommend([broken]).file is None


def test_a_partial_grid_is_advised_on_by_what_is_whole():
    partial = replace(cell("Q3_K_M", 95, right=right(200)), status="partial", why="stopped")
    failed = CellResult("merged", "Q2_K", "failed", "out of memory")
    found = recommend([Q8, Q4, partial, failed])
    assert found.cell == "Q4_K_M merged"
    assert found.why.endswith("Not ranked: Q2_K merged (failed), Q3_K_M merged (partial).")
    assert recommend([partial, failed]).file is None
    assert recommend([]).file is None


def test_a_figure_that_one_cell_lacks_counts_as_worse():
    whole = replace(F16, measures=F16.measures | {"loss": loss(1.0)})
    assert chosen(whole, Q4) == "F16 merged"
    assert "held-out loss not measured" in recommend([whole, Q4]).why


@pytest.mark.parametrize(
    ("limits", "taken"),
    [
        ({"max_size_bytes": 90_000_000}, "Q2_K merged"),
        ({"max_size_bytes": 150_000_000}, "Q4_K_M merged"),
        ({"min_quality": 0.92}, "Q8_0 merged"),  # Q4_K_M has 91 %
        ({"max_ram_bytes": 10**9}, ""),  # memory was not measured
        ({"max_size_bytes": 10**6}, ""),
    ],
)
def test_limits_change_the_choice(limits, taken):
    found = recommend([F16, Q8, Q4, Q2], Limits(**limits))
    assert found.cell == taken
    assert (found.file is None) == (not taken)
    assert "your limits" in found.why


def test_memory_is_a_limit():
    cells = [replace(c, speed=replace(c.speed, peak_bytes=p)) for c, p in ((F16, 600), (Q8, 400), (Q4, 500))]
    assert chosen(*cells, max_ram_bytes=450) == "Q8_0 merged"


def test_least_quality_without_a_task_is_refused():
    with pytest.raises(ConfigError) as e:
        recommend([cell("F16", 270, kl=Measure(0.0))], Limits(min_quality=0.9))
    assert e.value.what == "--min-quality 0.9: there is no share of right answers"
    assert e.value.why == "the files are ranked by KL to the reference here"


def test_the_base_alone_is_never_advised_beside_an_adapter_but_warns_where_it_does_as_well():
    base = cell("Q4_K_M", 100, "base", right=right(20))
    assert chosen(base, F16, Q4) == "Q4_K_M merged"
    good = replace(base, measures={"right": right(183)})
    found = recommend([good, F16, Q4])
    assert found.cell == "Q4_K_M merged"
    assert "But Q4_K_M base alone does as well" in found.why
    assert "does as well" not in recommend([base, F16, Q4]).why
    assert recommend([base]).cell == "Q4_K_M base alone"


def test_a_way_that_nobody_could_take_is_not_advised():
    """Live over the file is what an adapter that only torch runs never is."""
    q3 = cell("Q3_K_M", 95, right=right(182, flipped=3), speed=152.0)
    in_torch, live = replace(cell("Q3_K_M", 1, "torch"), path=""), cell("F16", 280, "live", right=right(186))
    said = "live over it, was not measured"
    assert said not in recommend([in_torch, F16, q3]).why
    assert said in recommend([in_torch, live, q3]).why
    assert said in recommend([F16, q3]).why


def test_what_torch_computed_is_compared_with_and_never_advised():
    best = replace(cell("Q4_K_M", 1, "torch", right=right(190)), path="")
    found = recommend([best, F16, Q8, Q4])
    assert found.cell == "Q4_K_M merged"  # within noise of the best that can be shipped
    change = "+4.0 points (95 %: {} … {})".format(*differs(Q4, best))
    assert f"To compare with, Q4_K_M adapter in torch: right answers 95.0% against 91.0%: {change}." in found.why
    assert frontier([best, F16, Q8, Q4], "right")[0] is Q4
    assert chosen(replace(best, quant="Q2_K"), F16, max_size_bytes=5_000_000) == ""  # not even where nothing else fits
    alone = recommend([cell("Q4_K_M", 1, "base", right=right(188)), best, replace(best, quant="Q2_K", status="failed")])
    assert (alone.file, alone.cell) == (None, "")
    assert alone.why.splitlines() == [
        "Nothing that was measured is a file to ship: torch computed it.",
        "The best of it is Q4_K_M adapter in torch: right answers 95.0%.",
        "But Q4_K_M base alone does as well: these rows do not show that the adapter helps.",
        "Not ranked: Q2_K adapter in torch (failed).",
    ]


def test_what_the_adapter_cost_elsewhere_is_said():
    text, worse, near = ({"perplexity": Measure(math.exp(x), None, (x * N,), (float(N),))} for x in (3.0, 3.3, 3.01))
    bases = [replace(cell(quant, size, "base", right=right(20)), measures=text) for quant, size in
             (("Q4_K_M", 105), ("F16", 270))]  # fmt: skip
    dear = replace(Q4, measures=Q4.measures | worse)
    assert "What it cost beside your task, against Q4_K_M base alone: perplexity" in recommend([*bases, F16, dear]).why
    assert "against F16 base alone" in recommend([bases[1], F16, dear]).why
    cheap = replace(Q4, measures=Q4.measures | near)
    assert "What it cost" not in recommend([*bases, F16, cheap]).why
    assert "What it cost" not in recommend([F16, dear]).why


def test_the_frontier_has_what_nothing_smaller_beats():
    bad = replace(Q8, quant="Q6_K", size_bytes=200_000_000)
    nan = cell("Q3_K_S", 80, right=Measure(math.nan))
    failed = CellResult("merged", "IQ1_S", "failed", size_bytes=1)
    assert [c.quant for c in frontier([F16, bad, nan, Q8, failed, Q4, Q2], "right")] == [
        "Q2_K",
        "Q4_K_M",
        "Q8_0",
        "F16",
    ]


def test_a_task_ranks_before_fidelity():
    both = cell("F16", 1, right=right(1), loss=loss(1.0), kl=Measure(0.1))
    assert ranked_by([both]) == ("right", "loss")
    assert ranked_by([cell("F16", 1, kl=Measure(0.1), perplexity=Measure(9.0))]) == ("kl",)
    assert ranked_by([]) == ()
