"""How a model's predictions differ from a reference's on the same text: llama-perplexity's --kl-divergence figures.

Every ± is a standard error with tokens taken as independent, as that tool has it. Tokens of one window are not, so each
mean has an interval of whole windows besides. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from edgelora.errors import EngineError

ROWS = 32  # positions looked at once: float32 over a vocabulary of 262,144 makes 32 MB of each array
QUANTILES = (0.0, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
DRAWS = 2000  # of the bootstrap
FEWEST_WINDOWS = 5  # drawing two again and again would say the same two numbers


class Reference(Protocol):
    """What a reference says of the scored positions of one window."""

    def compare(self, first: int, candidate: Candidate) -> Compared:
        """Against a candidate's rows [first, first + its number)."""
        ...


class Compared(NamedTuple):
    """Of each token: −log p of the target (nats) by the candidate and the reference, KL(reference ‖ candidate), and
    whether both find the same token likeliest."""

    nll: np.ndarray
    reference_nll: np.ndarray
    kl: np.ndarray
    same_top: np.ndarray


class Candidate:
    """Some rows of logits, float32 (n, V), and the tokens (n,) that followed. The arithmetic is llama-perplexity's:
    exponentials in float32, their sum in float64, the rest in float32."""

    def __init__(self, logits: np.ndarray, targets: np.ndarray) -> None:
        top = logits.max(-1, keepdims=True)
        log_sum = np.log(np.exp(logits - top).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
        if not np.isfinite(log_sum).all():
            raise EngineError(
                what="the model's logits are not finite",
                why="NaN or infinity came out of a decode, and no score can be made of that",
                fix="check the file with `edgelora doctor`, and the scales of its adapters",
            )
        self.logits, self.targets = logits, targets
        self.log_total = top + log_sum
        """(n, 1): what is taken from a logit to make it a log-probability."""

    @property
    def log_p(self) -> np.ndarray:
        """float32 (n, V)."""
        return np.asarray(self.logits - self.log_total)

    @property
    def nll(self) -> np.ndarray:
        """float32 (n,): −log p of the targets."""
        return np.asarray(self.log_total - self.of_targets(self.logits))[:, 0]

    @property
    def top(self) -> np.ndarray:
        """int64 (n,): the likeliest token of each row."""
        return np.asarray(self.logits.argmax(-1))

    def of_targets(self, values: np.ndarray) -> np.ndarray:
        """(n, 1) of (n, V)."""
        return np.take_along_axis(values, self.targets[:, None], -1)


class Exact:
    """A reference's own logits, float32 (n, V)."""

    def __init__(self, logits: np.ndarray) -> None:
        self.logits = logits

    def compare(self, first: int, candidate: Candidate) -> Compared:
        other = Candidate(self.logits[first : first + len(candidate.targets)], candidate.targets)
        log_p = other.log_p
        kl = (np.exp(log_p) * (log_p - candidate.log_p)).sum(-1, dtype=np.float64)
        return Compared(candidate.nll, other.nll, kl, candidate.top == other.top)


def compare(reference: Reference, logits: np.ndarray, targets: np.ndarray) -> Compared:
    """A candidate's logits of one window, float32 (n, V), against the reference; ROWS of them at once."""
    parts = [
        reference.compare(first, Candidate(logits[first : first + ROWS], targets[first : first + ROWS]))
        for first in range(0, len(targets), ROWS)
    ]
    return Compared(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error with tokens as independent, and its 95 % interval by resampling whole windows (None
    where there are fewer than FEWEST_WINDOWS)."""

    value: float
    error: float
    interval_95: tuple[float, float] | None = None


@dataclass(frozen=True)
class Divergence:
    """All over `n_tokens` scored tokens; KL in nats, Δp (the candidate's probability of the target minus the
    reference's) and `same_top` as shares. Quantiles by their fraction."""

    n_tokens: int
    perplexity: Estimate
    reference_perplexity: Estimate
    ln_ratio: Estimate
    ratio: Estimate
    difference: Estimate
    correlation: float
    """Of the two models' −log p."""
    kl: Estimate
    kl_quantiles: dict[float, float]
    delta_p: Estimate
    delta_p_rms: Estimate
    delta_p_quantiles: dict[float, float]
    same_top: Estimate

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def divergence(windows: Sequence[Compared]) -> Divergence:
    """The figures of a text whose windows were compared one by one."""
    together = Compared(*(np.concatenate(arrays).astype(np.float64) for arrays in zip(*windows, strict=True)))
    nll, base = _mean(together.nll), _mean(together.reference_nll)
    n = len(together.nll)
    covariance = _covariance(together.nll, together.reference_nll)
    ln_ratio = Estimate(nll.value - base.value, _root(nll.error**2 + base.error**2 - 2 * covariance))
    perplexity, reference = _exp(nll), _exp(base)
    delta_p = np.exp(-together.nll) - np.exp(-together.reference_nll)
    rms, agreed = _mean(np.square(delta_p)), float(together.same_top.mean())
    means = {
        "perplexity": _by_window(windows, lambda w: w.nll, math.exp),
        "reference_perplexity": _by_window(windows, lambda w: w.reference_nll, math.exp),
        "ln_ratio": _by_window(windows, lambda w: w.nll - w.reference_nll),
        "kl": _by_window(windows, lambda w: w.kl),
        "same_top": _by_window(windows, lambda w: w.same_top),
    }
    return Divergence(
        n_tokens=n,
        perplexity=Estimate(*perplexity, means["perplexity"]),
        reference_perplexity=Estimate(*reference, means["reference_perplexity"]),
        ln_ratio=Estimate(ln_ratio.value, ln_ratio.error, means["ln_ratio"]),
        ratio=Estimate(*_exp(ln_ratio)),
        difference=Estimate(
            perplexity[0] - reference[0],
            _root(perplexity[1] ** 2 + reference[1] ** 2 - 2 * perplexity[0] * reference[0] * covariance),
        ),
        correlation=covariance / (nll.error * base.error) if nll.error * base.error else math.nan,
        kl=Estimate(*_pair(_mean(together.kl)), means["kl"]),
        kl_quantiles=_quantiles(together.kl),
        delta_p=_mean(delta_p),
        delta_p_rms=Estimate(math.sqrt(rms.value), 0.5 / math.sqrt(rms.value) * rms.error if rms.value else 0.0),
        delta_p_quantiles=_quantiles(delta_p),
        same_top=Estimate(agreed, math.sqrt(agreed * (1 - agreed) / max(n - 1, 1)), means["same_top"]),
    )


def _mean(values: np.ndarray) -> Estimate:
    n, mean = len(values), float(values.mean())
    spread = max(float(np.square(values).mean()) - mean**2, 0.0)
    return Estimate(mean, math.sqrt(spread / (n - 1)) if n > 1 else math.inf)


def _pair(estimate: Estimate) -> tuple[float, float]:
    return estimate.value, estimate.error


def _exp(log: Estimate) -> tuple[float, float]:
    """By the delta method."""
    return math.exp(log.value), math.exp(log.value) * log.error


def _covariance(a: np.ndarray, b: np.ndarray) -> float:
    """Of the two means."""
    return float(((a * b).mean() - a.mean() * b.mean()) / (len(a) - 1)) if len(a) > 1 else 0.0


def _root(variance: float) -> float:
    return math.sqrt(max(variance, 0.0))  # that of a model against itself is 0 but for rounding


def _quantiles(values: np.ndarray) -> dict[float, float]:
    """Linear between neighbours, at f (n − 1); in float32 to the last digit, as llama-perplexity has them."""
    ordered = np.sort(values.astype(np.float32))
    found = {}
    for fraction in QUANTILES:
        place = np.float32(fraction) * np.float32(len(ordered) - 1)
        low = int(place)
        share = place - np.float32(low)
        high = min(low + 1, len(ordered) - 1)
        found[fraction] = float((np.float32(1) - share) * ordered[low] + share * ordered[high])
    return found


def _by_window(windows: Sequence[Compared], of: Any, finish: Any = float) -> tuple[float, float] | None:
    """The 95 % interval of a mean when whole windows are drawn again (percentile bootstrap, Efron 1979)."""
    if len(windows) < FEWEST_WINDOWS:
        return None
    means = np.array([float(np.mean(of(window))) for window in windows])
    draw = np.random.default_rng(0)
    drawn = np.sort(means[draw.integers(0, len(means), (DRAWS, len(means)))].mean(-1))
    low, high = drawn[int(0.025 * DRAWS)], drawn[int(0.975 * DRAWS) - 1]
    return finish(float(low)), finish(float(high))
