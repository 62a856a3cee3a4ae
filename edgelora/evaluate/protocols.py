"""What a score needs from whoever runs the model: `runtime` and `base` provide it, `evaluate` only asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edgelora.progress import OnProgress, silent


@dataclass(frozen=True)
class Question:
    """`prompt` ids to answer, and the `reference` ids that the answer is scored against (with its end-of-turn)."""

    prompt: Sequence[int]
    reference: Sequence[int]


@dataclass(frozen=True)
class Answer:
    """The greedy answer without its end, and −log p (nats) of each reference token after the prompt."""

    tokens: list[int]
    nll: np.ndarray


@dataclass(frozen=True)
class Alternative:
    """Token ids, of which those from `first` on are scored."""

    ids: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class Rates:
    """Tokens/s of each repeat after a warm-up, and the seconds of the warm-up's prompt: to the first token, cold."""

    prompt: tuple[float, ...]
    generation: tuple[float, ...]
    first_token_seconds: float


class Scorer(Protocol):
    """A model that answers and scores: `runtime/scorer.py` in llama.cpp, `pipeline/torch_scorer.py` in torch."""

    def answer(self, questions: Sequence[Question], max_tokens: int, on_progress: OnProgress = silent) -> list[Answer]:
        """Answer each question greedily, and score its reference."""
        ...

    def log_p(self, alternatives: Sequence[Alternative]) -> list[np.ndarray]:
        """Of each alternative the log-probabilities (nats) of its scored ids."""
        ...

    def logits(self, sequences: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 (all wanted, V): what follows the positions `wanted` of each sequence."""
        ...

    def rates(self) -> Rates:
        """How fast it reads and writes."""
        ...


@dataclass(frozen=True)
class Speed:
    """Medians of a few repeats, in tokens per second."""

    prompt_tokens_per_s: float
    generation_tokens_per_s: float
    load_seconds: float
    peak_bytes: int
    prompt_range: tuple[float, float] | None = None
    """The slowest and the fastest repeat."""
    generation_range: tuple[float, float] | None = None
    first_token_seconds: float | None = None
    switch_seconds: float | None = None
    """To change from one live adapter to another."""
