"""Examples → packed rows of tokens: no padding, attention stays inside an example, a shared beginning is kept once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgelora.data.encode import Example

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """One packed row: a prefix that all its examples begin with, computed once, then the rest of each example.

    `labels[t]` is the id that must follow token t, or IGNORE where nothing is learned. `n_tokens` counts the tokens of
    the examples, the shared ones once for each.
    """

    input_ids: np.ndarray  # (T,)
    positions: np.ndarray  # (T,)
    prefix: int
    segment_starts: tuple[int, ...]  # n + 1 borders, from `prefix` to T
    labels: np.ndarray  # (T,)
    n_tokens: int

    @property
    def n_loss_tokens(self) -> int:
        return int(np.count_nonzero(self.labels != IGNORE))


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
    )


def best_fit(examples: Sequence[Example], max_tokens: int) -> list[Batch]:
    """Few rows of at most `max_tokens` tokens: longest first, each into the fullest row that still holds it.

    An example longer than `max_tokens` gets a row of its own. Deterministic.
    """
    prefix = shared_prefix(examples)
    rows: list[list[Example]] = []
    free: list[int] = []
    for example in sorted(examples, key=len, reverse=True):
        fits = [i for i, room in enumerate(free) if room >= len(example) - prefix]
        if fits:
            best = min(fits, key=lambda i: free[i])
            rows[best].append(example)
            free[best] -= len(example) - prefix
        else:
            rows.append([example])
            free.append(max_tokens - len(example))
    return [pack(row) for row in rows]


def steps(
    examples: Sequence[Example], batch_rows: int, max_tokens: int, epochs: float, seed: int
) -> Iterator[list[Batch]]:
    """For each optimizer step its micro-batches: `batch_rows` shuffled examples, packed; the same for the same seed."""
    total = n_steps(len(examples), batch_rows, epochs)
    order: list[int] = []
    shuffle = np.random.default_rng(seed)
    for _ in range(total):
        while len(order) < batch_rows:
            order.extend(shuffle.permutation(len(examples)).tolist())
        chosen, order = order[:batch_rows], order[batch_rows:]
        yield best_fit([examples[i] for i in chosen], max_tokens)


def n_steps(n_examples: int, batch_rows: int, epochs: float) -> int:
    """Enough steps that `epochs` passes leave no row out."""
    return max(1, math.ceil(round(n_examples * epochs / batch_rows, 6)))
