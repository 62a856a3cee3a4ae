"""Hitting a size: the knapsack against brute force, and a plan's way from a target to a file."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type

from converters.budget import Choice, least_bytes, least_damage
from edgelora.errors import ConfigError

KINDS = [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K]


def drawn(seed: int) -> dict[str, list[Choice]]:
    """Up to seven tensors with up to five choices each; bytes and damage fall on few values, so that there are ties."""
    draw = np.random.default_rng(seed)
    return {
        f"t{i}": [
            Choice(KINDS[j], int(draw.integers(1, 12)), float(draw.integers(0, 9)) / 10)
            for j in range(draw.integers(1, 6))
        ]
        for i in range(draw.integers(1, 8))
    }


def totals(taken: list[Choice] | tuple[Choice, ...]) -> tuple[int, float]:
    return sum(c.size_bytes for c in taken), sum(c.damage for c in taken)


@pytest.mark.parametrize("seed", range(60))
def test_the_knapsack_is_as_good_as_brute_force(seed):
    choices = drawn(seed)
    every = [totals(taken) for taken in itertools.product(*choices.values())]
    for limit in {size for size, _ in every}:
        size, damage = totals(list(least_damage(choices, limit).values()))
        assert size <= limit
        assert damage == pytest.approx(min(d for s, d in every if s <= limit), abs=1e-9)
    for limit in {round(damage, 6) + 1e-9 for _, damage in every}:
        size, damage = totals(list(least_bytes(choices, limit).values()))
        assert damage <= limit * (1 + 1e-9)
        assert size == min(s for s, d in every if d <= limit)


def test_a_model_of_many_alike_tensors_is_solved_exactly():
    """As large as a real one: 7 matrices in 30 layers and an embedding, 10 types, ratios that hardly differ.

    The oracle is the textbook's dynamic programme over every number of bytes (in units of all sizes' divisor).
    """
    draw = np.random.default_rng(0)
    sizes = {
        f"{i}.{name}": blocks for i in range(30) for name, blocks in zip("qkvogud", (3, 1, 1, 3, 6, 6, 6), strict=True)
    }
    sizes["embedding"] = 192
    per_block = [66, 74, 82, 84, 98, 110, 136, 144, 176, 210]
    choices = {}
    for name, blocks in sizes.items():
        curve = draw.lognormal(0, 0.4) * blocks**0.5
        choices[name] = [
            Choice(Type.Q4_K, blocks * b, curve * 4 ** (-b / 32) * draw.uniform(0.9, 1.1)) for b in per_block
        ]
    limit = int(sum(sizes.values()) * 140.3)
    best = np.zeros(limit // 2 + 1)  # by the units there are: the least damage of the tensors so far
    for given in choices.values():
        ways = []
        for choice in given:
            units = choice.size_bytes // 2
            ways.append(np.concatenate((np.full(units, np.inf), best[:-units] + choice.damage)))
        best = np.min(ways, 0)
    size, damage = totals(list(least_damage(choices, limit).values()))
    assert size <= limit
    assert damage == pytest.approx(best[-1], rel=1e-9)


def test_what_cannot_be_reached_is_said():
    choices = {"a": [Choice(Type.Q2_K, 4_000_000, 0.5), Choice(Type.Q6_K, 9_000_000, 0.1)]}
    with pytest.raises(ConfigError, match=r"3\.99 MB are too few") as too_small:
        least_damage(choices, 3_990_000)
    assert "4.00 MB" in too_small.value.why
    with pytest.raises(ConfigError, match=r"a KL of 0\.05 is out of reach") as too_good:
        least_bytes(choices, 0.05)
    assert "0.1" in too_good.value.why
