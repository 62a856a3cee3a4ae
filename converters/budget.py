"""Which type each tensor gets so that a file keeps to a limit: the multiple-choice knapsack, solved exactly. No I/O.

Every tensor takes one of its choices; bytes and damage each add up over tensors. States are the Pareto front of what
was chosen so far (Nemhauser and Ullmann, 1969), and a state dies where even the fractional optimum of the tensors left
(Sinha and Zoltners, 1979: steps along each tensor's convex hull) cannot beat a whole solution that is known.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGMLQuantizationType

from edgelora.errors import ConfigError

# Sums of floats in another order differ in their last bits: no solution is thrown away for that.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Choice:
    """A tensor stored as `type`: what it takes, and what it costs in KL (nats) that nothing else is lowered."""

    type: GGMLQuantizationType
    size_bytes: int
    damage: float


def least_damage(choices: Mapping[str, Sequence[Choice]], limit_bytes: int) -> dict[str, Choice]:
    """The choice of each tensor with the least total damage within `limit_bytes`.

    Raises ConfigError if even the smallest choices are larger.
    """
    require_room([[c.size_bytes for c in given] for given in choices.values()], limit_bytes)
    pairs = [[(float(c.size_bytes), c.damage) for c in given] for given in choices.values()]
    return _named(choices, _knapsack(pairs, float(limit_bytes)))


def require_room(sizes: Sequence[Sequence[int]], limit_bytes: int) -> None:
    """Raise ConfigError if even the smallest of each tensor's `sizes` are more than `limit_bytes` in all."""
    smallest = sum(map(min, sizes))
    if smallest > limit_bytes:
        raise ConfigError(
            what=f"{limit_bytes / 1e6:.2f} MB are too few for these weights",
            why=f"with the smallest type of every tensor they take {smallest / 1e6:.2f} MB",
            fix="ask for a larger file, or allow smaller types (the smallest need an importance matrix)",
        )


def least_bytes(choices: Mapping[str, Sequence[Choice]], limit_damage: float) -> dict[str, Choice]:
    """The choice of each tensor with the fewest bytes in all whose damage adds up to at most `limit_damage`.

    Raises ConfigError if even the best choices do more.
    """
    best = sum(min(c.damage for c in given) for given in choices.values())
    if best > limit_damage:
        raise ConfigError(
            what=f"a KL of {limit_damage:.3g} is out of reach",
            why=f"with the best type of every tensor it is {best:.3g}",
            fix="ask for a larger KL, or allow larger types",
        )
    pairs = [[(c.damage, float(c.size_bytes)) for c in given] for given in choices.values()]
    return _named(choices, _knapsack(pairs, limit_damage))


def _named(choices: Mapping[str, Sequence[Choice]], taken: Sequence[int]) -> dict[str, Choice]:
    return {name: given[i] for (name, given), i in zip(choices.items(), taken, strict=True)}


Points = Sequence[tuple[float, float]]
"""The choices of one item as (weight, value)."""


def _knapsack(items: Sequence[Points], limit: float) -> list[int]:
    """For each item the index of a choice: the least sum of values whose weights sum to at most `limit`.

    There must be a solution.
    """
    # large steps first: the small ones at the end then fill what is left
    order = sorted(range(len(items)), key=lambda i: min(items[i])[0] - max(items[i])[0])
    hulls = [_hull(items[i]) for i in order]
    bounds = [_Fractional(hulls[i:]) for i in range(len(order) + 1)]
    known = _greedy(hulls, limit)
    weights, values = np.zeros(1), np.zeros(1)
    history: list[tuple[np.ndarray, np.ndarray]] = []
    for item, bound in zip((items[i] for i in order), bounds[1:], strict=True):
        points = np.array(item)
        w = np.add.outer(weights, points[:, 0]).ravel()  # (states · choices,)
        v = np.add.outer(values, points[:, 1]).ravel()
        alive = np.flatnonzero(v + bound(limit - w) <= known * (1 + ROUNDING))
        alive = alive[np.lexsort((v[alive], w[alive]))]
        best = np.minimum.accumulate(np.concatenate(([np.inf], v[alive])))
        alive = alive[v[alive] < best[:-1]]  # nothing lighter has as small a value
        weights, values = w[alive], v[alive]
        history.append((alive // len(points), alive % len(points)))
    taken, state = [0] * len(items), len(values) - 1  # the heaviest state of a front has the least value
    for i, (parents, chosen) in zip(reversed(order), reversed(history), strict=True):
        taken[i], state = int(chosen[state]), int(parents[state])
    return taken


def _hull(points: Points) -> list[tuple[float, float]]:
    """The lower convex hull of the choices, from the lightest to the one with the least value."""
    hull: list[tuple[float, float]] = []
    for point in sorted(points):
        if hull and point[1] >= hull[-1][1]:
            continue  # heavier and no better
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


class _Fractional:
    """The least value of some items as a function of the weight there is, if steps could be taken in part.

    It is convex and made of straight lines: the steps of all hulls, the most worthwhile first.
    """

    def __init__(self, hulls: Sequence[Points]) -> None:
        steps = sorted((_slope(a, b), b[0] - a[0], b[1] - a[1]) for hull in hulls for a, b in itertools.pairwise(hull))
        lightest = np.array([hull[0] for hull in hulls]).reshape(-1, 2).sum(0)
        line = np.array([lightest, *([w, v] for _, w, v in steps)]).cumsum(0)
        self.weights, self.values = line[:, 0], line[:, 1]

    def __call__(self, room: np.ndarray) -> np.ndarray:
        """The bound for each weight there is; infinite where not even the lightest choices fit."""
        value = np.interp(room, self.weights, self.values)
        return np.where(room < self.weights[0] * (1 - ROUNDING), np.inf, value)


def _greedy(hulls: Sequence[Points], limit: float) -> float:
    """The value of a solution in whole steps: the most worthwhile first, whatever still fits."""
    steps = sorted((_slope(a, b), i, b[0] - a[0], b[1] - a[1]) for i, hull in enumerate(hulls) for a, b in
                   itertools.pairwise(hull))  # fmt: skip
    room, value = limit - sum(hull[0][0] for hull in hulls), sum(hull[0][1] for hull in hulls)
    stuck = set()  # items whose next step does not fit take none of those behind it
    for _, i, w, v in steps:
        if i not in stuck and w <= room:
            room, value = room - w, value + v
        else:
            stuck.add(i)
    return value
