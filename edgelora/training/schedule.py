"""Learning rates over a run, as shares of the peak: linear, cosine, constant and WSD, each behind a warm-up."""

from __future__ import annotations

import math

from edgelora.config import Schedule


def share_at(schedule: Schedule, step: int, total: int, warmup: int, decay_share: float) -> float:
    """The share of the peak learning rate at `step` (from 0) of `total`, in (0, 1].

    It rises linearly over `warmup` steps, at most half of the run, the first of which learns already. Then linear and
    cosine fall to 0 where the run ends; constant stays; WSD stays and falls over the last `decay_share` of the run.
    """
    warmup = min(warmup, total // 2)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    n_falling = total - warmup
    if schedule == "wsd":
        n_falling = max(1, min(round(decay_share * total), n_falling))
    left = max(0.0, min(1.0, (total - step) / n_falling))  # of the fall: 1 until it begins, 0 where the run ends
    if schedule == "linear":
        return left
    if schedule == "cosine":  # SGDR (arXiv:1608.03983) without restarts
        return 0.5 * (1 - math.cos(math.pi * left))
    # a plateau, then a short fall by 1 − √, better than a linear one there (arXiv:2405.18392, section 3)
    return 1 - math.sqrt(1 - left)
