"""What library code says while it works. It never prints: it sends `Progress` to whoever listens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One moment of a long job. Fields that do not apply are None."""

    stage: str
    step: int
    total: int
    loss: float | None = None
    learning_rate: float | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None
    peak_bytes: int | None = None


OnProgress = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """The listener of whoever does not want to know."""


class Pace:
    """Tokens per second and the time left, over the whole job so far."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.tokens = total, 0, 0
        self.start = time.perf_counter()

    def step(self, tokens: int, steps: int = 1) -> tuple[float, float]:
        """Count `steps` more with `tokens` in them; returns (tokens/s, seconds left)."""
        self.done += steps
        self.tokens += tokens
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        return self.tokens / elapsed, elapsed / self.done * (self.total - self.done)
