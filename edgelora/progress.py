"""What library code says while it works. It never prints: it sends `Progress` to whoever listens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

SMOOTHING = 0.9  # how much of the smoothed loss each step keeps: an average over about the last ten


@dataclass(frozen=True)
class Sample:
    """What the model answers to a fixed prompt at this moment. `ended`: by itself, before its room was full."""

    prompt: str
    text: str
    ended: bool = True


@dataclass(frozen=True)
class Progress:
    """One moment of a long job. Fields that do not apply are None.

    `held_out_loss`, `held_out_numbers`, `best` and `samples` come with the step after which they were measured, and
    with no other.
    """

    stage: str
    step: int
    total: int
    loss: float | None = None
    """Of this step: mean −log p over its tokens, in nats."""
    learning_rate: float | None = None
    tokens_per_s: float | None = None
    """Of real tokens, never padding."""
    eta_s: float | None = None
    peak_bytes: int | None = None
    epoch: float | None = None
    """How often the data was seen: 1.5 in the middle of the second time."""
    smoothed_loss: float | None = None
    held_out_loss: float | None = None
    best: bool | None = None
    """Whether no held-out loss of this run was lower before."""
    grad_norm: float | None = None
    """Before clipping."""
    skipped_steps: int | None = None
    """How many steps so far were not finite and taught nothing."""
    samples: tuple[Sample, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What the objective says beside its loss, by TRL's names: `rewards/chosen`, `rewards/accuracies` …"""
    held_out_numbers: Mapping[str, float] = field(default_factory=dict)
    """The same over the rows held out."""


OnProgress = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """The listener of whoever does not want to know."""


def as_json(progress: Progress) -> dict[str, Any]:
    """The fields that apply, as JSON knows them: a number that is not finite is null."""
    fields = {name: finite(value) for name, value in asdict(progress).items() if value not in (None, (), {})}
    return {"event": "progress", **fields}


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Smoothed:
    """The moving average of a loss, without the bias of its start (Adam's, arXiv:1412.6980, section 3).

    A loss that is not finite leaves it as it is: one skipped step must not spoil the curve. None before the first loss.
    """

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    @property
    def value(self) -> float | None:
        return self._sum / self._weight if self._weight else None

    def state(self) -> list[str]:
        """Its numbers to the last bit, for `restore`."""
        return [self._sum.hex(), self._weight.hex()]

    def restore(self, state: list[str]) -> None:
        """Go on from what `state` told."""
        self._sum, self._weight = (float.fromhex(number) for number in state)

    def add(self, loss: float | None) -> float | None:
        """Count one more loss; returns the new average."""
        if loss is not None and math.isfinite(loss):
            self._sum = SMOOTHING * self._sum + (1 - SMOOTHING) * loss
            self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        return self.value


class Pace:
    """Tokens per second and the time left, over the whole job so far.

    `first` steps of `total` were done before (a resumed run): they count neither as work nor as time.
    """

    def __init__(self, total: int, first: int = 0) -> None:
        self.total, self.first, self.done, self.tokens = total, first, first, 0
        self.start, self._aside = time.perf_counter(), 0.0
        self._measuring, self._measured = 0.0, 0

    def step(self, tokens: int, steps: int = 1, measurements: int = 0) -> tuple[float, float]:
        """Count `steps` more with `tokens` in them; returns (tokens/s, seconds left).

        measurements: how many there will be, each as long as those so far were.
        """
        self.done += steps
        self.tokens += tokens
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        left = (elapsed - self._measuring) / (self.done - self.first) * (self.total - self.done)
        left += measurements * self._measuring / max(self._measured, 1)
        return self.tokens / max(elapsed - self._aside, 1e-9), left

    @contextmanager
    def aside(self, measures: bool = False) -> Iterator[None]:
        """What happens inside, such as a checkpoint, takes of the time that is left, but slows no token.

        measures: it is a measurement, which slows no step either: how many are left is known.
        """
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            self._aside += seconds
            if measures:
                self._measuring, self._measured = self._measuring + seconds, self._measured + 1
