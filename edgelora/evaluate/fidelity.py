"""How far two models' next-token distributions are apart on the same tokens: KL divergence and top-1 agreement."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

ROWS = 16  # positions compared at once: float64 over a large vocabulary is large


@dataclass(frozen=True)
class Fidelity:
    """KL(reference ‖ candidate) in nats over `n_tokens` positions, and the share of equal most-likely tokens.

    `worst_flip_nats`: the most that the reference loses in log p where the candidate prefers another token; near 0 the
    two were as good as tied.
    """

    n_tokens: int
    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_max: float
    same_top: float
    worst_flip_nats: float

    @property
    def same_top_error(self) -> float:
        """Standard error of `same_top`, positions taken as independent (as llama-perplexity has it)."""
        return math.sqrt(self.same_top * (1 - self.same_top) / max(self.n_tokens - 1, 1))

    def as_dict(self) -> dict[str, Any]:
        values = {**asdict(self), "same_top_error": self.same_top_error}
        return {k: round(v, 8) if isinstance(v, float) else v for k, v in values.items()}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(n, V) float64 log-probabilities."""
    z = logits.astype(np.float64)
    z -= z.max(-1, keepdims=True)
    z -= np.log(np.exp(z).sum(-1, keepdims=True))
    return z


class Tally:
    """Logits are compared as they come, group by group; a few numbers of each position stay."""

    def __init__(self) -> None:
        self._kl: list[np.ndarray] = []
        self._lost: list[np.ndarray] = []

    def add(self, reference: np.ndarray, candidate: np.ndarray) -> None:
        """Logits of the same positions, each (n, V)."""
        for first in range(0, len(reference), ROWS):
            p, q = log_softmax(reference[first : first + ROWS]), log_softmax(candidate[first : first + ROWS])
            self._kl.append((np.exp(p) * (p - q)).sum(-1))
        chosen = np.take_along_axis(reference, candidate.argmax(-1)[:, None], -1)[:, 0]
        self._lost.append(reference.max(-1) - chosen)

    def found(self) -> Fidelity:
        """Of all positions so far, which must be one at least."""
        values, flips = np.concatenate(self._kl), np.concatenate(self._lost)
        return Fidelity(
            n_tokens=len(values),
            kl_mean=float(values.mean()),
            kl_median=float(np.median(values)),
            kl_p99=float(np.percentile(values, 99)),
            kl_max=float(values.max()),
            same_top=float((flips == 0).mean()),
            worst_flip_nats=float(flips.max()),
        )


def fidelity(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Fidelity:
    """Compare (reference, candidate) logits, each (n, V), row group by row group; keeps one group in memory."""
    tally = Tally()
    for reference, candidate in pairs:
        tally.add(reference, candidate)
    return tally.found()
