"""Examples → packed rows of tokens: no padding, attention stays inside an example, a shared beginning is kept once."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgelora.data.encode import Example

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """One packed row: a prefix that all its examples begin with, computed once, then the rest of each example.

    `labels[t]` is the id that must follow token t, or IGNORE where nothing is learned; `weights[t]` is what it counts
    in the loss (None: 1). `n_tokens` counts the tokens of the examples, the shared ones once for each.
    """

    input_ids: np.ndarray  # (T,)
    positions: np.ndarray  # (T,)
    prefix: int
    segment_starts: tuple[int, ...]  # n + 1 borders, from `prefix` to T
    labels: np.ndarray  # (T,)
    n_tokens: int
    weights: np.ndarray | None = None  # (T,) float32

    @property
    def n_loss_tokens(self) -> int:
        """Positions that are learned from, whatever they count."""
        return int(np.count_nonzero(self.labels != IGNORE))

    @property
    def loss_weight(self) -> float:
        """What all its labels together count in the loss: their number, where they have no weights."""
        if self.weights is None:
            return float(self.n_loss_tokens)
        return float(self.weights[self.labels != IGNORE].sum(dtype=np.float64))


def shared_prefix(examples: Sequence[Example]) -> int:
    """How many tokens all examples begin with, before the position from which any of them learns.

    Exact: what such a token computes depends on the tokens before it alone, and its gradients are sums over examples.
    """
    limit = max(0, min(int(np.argmax(e.loss_mask)) - 1 for e in examples))
    first = examples[0].input_ids
    for e in examples[1:]:
        differing = np.flatnonzero(e.input_ids[:limit] != first[:limit])
        limit = int(differing[0]) if len(differing) else limit
    return limit if len(examples) > 1 else 0


def pack(examples: Sequence[Example]) -> Batch:
    """Lay examples end to end in one row, after what they all begin with."""
    prefix = shared_prefix(examples)
    labels = [np.full(prefix, IGNORE)]
    for e in examples:
        following = np.where(e.loss_mask[1:], e.input_ids[1:], IGNORE)
        labels.append(np.append(following, IGNORE)[prefix:])
    starts = prefix + np.cumsum([0, *(len(e) - prefix for e in examples)])
    return Batch(
        input_ids=np.concatenate([examples[0].input_ids[:prefix], *(e.input_ids[prefix:] for e in examples)]),
        positions=np.concatenate([np.arange(prefix), *(np.arange(prefix, len(e)) for e in examples)]),
        prefix=prefix,
        segment_starts=tuple(int(s) for s in starts),
        labels=np.concatenate(labels),
        n_tokens=sum(len(e) for e in examples),
        weights=None if all(e.weights is None for e in examples) else _weights(examples, prefix),
    )


def unshared(batch: Batch) -> Batch:
    """The same, with what its segments begin with before each of them."""
    segments = [slice(first, last) for first, last in itertools.pairwise(batch.segment_starts)]

    def spread(values: np.ndarray) -> np.ndarray:
        return np.concatenate([part for own in segments for part in (values[: batch.prefix], values[own])])

    starts = np.cumsum([0, *(batch.prefix + own.stop - own.start for own in segments)])
    return Batch(
        spread(batch.input_ids), spread(batch.positions), 0, tuple(map(int, starts)), spread(batch.labels),
        batch.n_tokens, None if batch.weights is None else spread(batch.weights),
    )  # fmt: skip


def _weights(examples: Sequence[Example], prefix: int) -> np.ndarray:
    """What follows each token counts (T,); 0 where nothing is learned."""
    parts = [np.zeros(prefix, np.float32)]
    for e in examples:
        counts = e.loss_mask.astype(np.float32) if e.weights is None else e.weights
        parts.append(np.append(counts[1:], np.float32(0))[prefix:])
    return np.concatenate(parts)


def best_fit(examples: Sequence[Example], max_tokens: int) -> list[Batch]:
    """Few rows of at most `max_tokens` tokens: longest first, each into the fullest row that still holds it.

    An example longer than `max_tokens` gets a row of its own. Deterministic.
    """
    prefix = shared_prefix(examples)
    rows = _fitted([len(e) - prefix for e in examples], max_tokens - prefix)
    return [pack([examples[i] for i in row]) for row in rows]


def _fitted(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of things of these sizes in rows of at most `room`: best fit, the longest first (Johnson 1974)."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, row), sorted: of rows with the same room the first is taken
    for number in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        at = bisect.bisect_left(free, (sizes[number], -1))
        left, row = free.pop(at) if at < len(free) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        bisect.insort(free, (left - sizes[number], row))
    return rows
