"""The certificate's limit of equal tops: what chance alone does to few tokens is no fault of a file."""

from __future__ import annotations

from dataclasses import replace
from math import comb

import pytest

from edgelora.evaluate.fidelity import Fidelity
from edgelora.pipeline.export import SAME_TOP_SLACK, same_top_slack

WRONG = 0.39  # the most that a wrong rotary order left of SmolLM2-135M's (evaluate/thresholds.py)


def of(k: int, n: int) -> Fidelity:
    return replace(Fidelity(n, 0, 0, 0, 0, 0, 0), same_top=k / n)


def chances(n: int, p: float) -> list[float]:
    """Of each number of equal tops among n."""
    return [comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]


def rejected(n: int, base: float, adapter: float) -> float:
    """How often a file fails, exactly: over every pair of outcomes of these true shares."""
    floors, found = chances(n, base), chances(n, adapter)
    limits = [k / n - same_top_slack(of(k, n)) for k in range(n + 1)]
    below = [sum(chance for k, chance in enumerate(found) if k / n < limit) for limit in limits]
    return sum(chance * share for chance, share in zip(floors, below, strict=True))


@pytest.mark.parametrize("n", [1, 5, 10, 20, 50, 87, 300])
@pytest.mark.parametrize("share", [0.8, 0.9, 0.96, 0.99])
def test_a_right_file_hardly_ever_fails(n, share):
    """With five points at any number of tokens it were 39 % of 10 tokens at 0.8, and 10 % of 50 at 0.96."""
    assert rejected(n, share, share) < 0.004


@pytest.mark.parametrize(("n", "caught"), [(20, 0.94), (30, 0.99), (87, 0.9999)])
def test_a_wrong_file_does(n, caught):
    assert rejected(n, 0.96, WRONG) > caught


def test_many_tokens_leave_five_points():
    assert same_top_slack(of(9600, 10000)) == SAME_TOP_SLACK
    assert same_top_slack(of(10, 10)) > 0.5
