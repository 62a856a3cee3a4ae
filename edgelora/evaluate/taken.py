"""What was scored, as the measures of a cell: figures with intervals, and the rows that pairs are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgelora.evaluate.cells import Measure
from edgelora.evaluate.choices import ChoiceScore
from edgelora.evaluate.paired import of_means
from edgelora.evaluate.score import RowScore, Scored

CUSTOM = "per_token"  # of multiple choice: as llama-perplexity counts


@dataclass(frozen=True)
class WindowSums:
    """Over the scored tokens of one window of a text: −log p and KL to a reference in nats (None without one), how
    often both find the same token likeliest, and how many bytes of text they stand for."""

    n_tokens: int
    n_bytes: int
    nll_nats: float
    kl_nats: float | None = None
    same_top: int | None = None


def task_measures(scored: Scored) -> dict[str, Measure]:
    """`right` and `loss`, and each of every group: `right/known`."""
    found = {"right": _share(scored.rows), "loss": _loss(scored.rows)}
    for group in scored.groups:
        some = [row for row in scored.rows if row.group == group]
        found |= {f"right/{group}": _share(some), f"loss/{group}": _loss(some)}
    return found


def choice_measure(score: ChoiceScore, custom: str = CUSTOM) -> Measure:
    """The share of questions whose likeliest alternative is the right one, by one custom of counting."""
    return _mean([float(right) for right in score.right[custom]], chance=score.chance)


def text_measures(windows: Sequence[WindowSums]) -> dict[str, Measure]:
    """`perplexity`, `bits_per_byte`, and against a reference `kl` and `same_top`; intervals by resampling windows."""
    tokens = [float(window.n_tokens) for window in windows]
    nats = [window.nll_nats for window in windows]
    found = {
        "perplexity": _mean(nats, tokens, finish=math.exp),
        "bits_per_byte": _mean([value / math.log(2) for value in nats], [float(w.n_bytes) for w in windows]),
    }
    kl = [window.kl_nats for window in windows if window.kl_nats is not None]
    same = [float(window.same_top) for window in windows if window.same_top is not None]
    if kl:
        found |= {"kl": _mean(kl, tokens), "same_top": _mean(same, tokens)}
    return found


def _share(rows: Sequence[RowScore]) -> Measure:
    return _mean([float(row.right) for row in rows])


def _loss(rows: Sequence[RowScore]) -> Measure:
    return _mean([row.nll_nats for row in rows], [float(row.n_tokens) for row in rows])


def _mean(
    rows: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    finish: Callable[[float], float] = float,
    chance: float | None = None,
) -> Measure:
    """Σ rows / Σ weights (or their number) through `finish`, and its 95 % interval where there are two rows."""
    kept = (tuple(rows), tuple(weights or ()))
    if not all(map(math.isfinite, rows)):
        return Measure(math.nan, None, *kept, chance)
    found = of_means([0.0] * len(rows), rows, weights)
    low, high = map(finish, found.interval_95)
    return Measure(finish(found.value), (low, high) if len(rows) > 1 else None, *kept, chance)
