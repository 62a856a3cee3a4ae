"""Perplexity of a text, by llama-perplexity's protocol: windows that do not overlap, the second half of each scored.

Whoever runs the model gives −log p of each token; how is its business. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Window:
    """`ids` (C,) to evaluate; the tokens [first, C) are scored, each as predicted by those before it.

    The first id may be BOS in place of the text's own token, as llama-perplexity has it: replaced, not prepended.
    """

    ids: np.ndarray
    first: int

    @property
    def targets(self) -> np.ndarray:
        """The tokens that are scored."""
        return self.ids[self.first :]


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean −log p over `n_tokens`, and its standard error, tokens taken as independent."""

    value: float
    error: float
    n_tokens: int


def windows(ids: Sequence[int], size: int, bos: int | None = None, limit: int | None = None) -> list[Window]:
    """A text's whole windows of `size` tokens (a rest is dropped), at most `limit`; `bos` where the model wants it."""
    n = len(ids) // size
    found = []
    for i in range(n if limit is None else min(n, limit)):
        part = np.array(ids[i * size : (i + 1) * size], np.int64)
        if bos is not None:
            part[0] = bos
        found.append(Window(part, size // 2 + 1))
    return found


def perplexity(parts: Sequence[Window], nll: Callable[[Window], np.ndarray]) -> Perplexity:
    """`nll(window)` gives −log p in nats of each of `window.targets`. Raises ValueError without a window."""
    if not parts:
        raise ValueError("a text shorter than one window has no perplexity")
    return perplexity_of(np.concatenate([nll(part) for part in parts]))


def perplexity_of(nll: np.ndarray) -> Perplexity:
    """Of tokens whose −log p (nats) are known."""
    values = nll.astype(np.float64)
    mean, n = float(values.mean()), len(values)
    error = math.sqrt(max(float(np.square(values).mean()) - mean**2, 0.0) / (n - 1)) if n > 1 else math.inf
    return Perplexity(math.exp(mean), math.exp(mean) * error, n)


def nll_of(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """−log p (n,) in nats of `targets` (n,) under float32 logits (n, V), summed in float64 as llama.cpp does."""
    top = logits.max(-1, keepdims=True)
    total = np.exp(logits - top).sum(-1, dtype=np.float64)
    return np.asarray(np.log(total) - (np.take_along_axis(logits, targets[:, None], 1) - top)[:, 0], np.float64)
