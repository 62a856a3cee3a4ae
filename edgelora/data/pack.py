"""Examples → packed rows of tokens: no padding, positions restart with each example, attention stays inside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgelora.data.encode import Example

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """One packed row. `labels[t]` is the id that must follow token t, or IGNORE where nothing is learned."""

    input_ids: np.ndarray  # (T,)
    positions: np.ndarray  # (T,)
    segment_starts: tuple[int, ...]  # n + 1 borders, from 0 to T
    labels: np.ndarray  # (T,)

    @property
    def n_loss_tokens(self) -> int:
        return int(np.count_nonzero(self.labels != IGNORE))


def pack(examples: Sequence[Example]) -> Batch:
    """Lay examples end to end in one row."""
    labels = []
    for e in examples:
        following = np.where(e.loss_mask[1:], e.input_ids[1:], IGNORE)
        labels.append(np.append(following, IGNORE))
    starts = np.cumsum([0, *(len(e) for e in examples)])
    return Batch(
        input_ids=np.concatenate([e.input_ids for e in examples]),
        positions=np.concatenate([np.arange(len(e)) for e in examples]),
        segment_starts=tuple(int(s) for s in starts),
        labels=np.concatenate(labels),
    )


def best_fit(examples: Sequence[Example], max_tokens: int) -> list[Batch]:
    """Few rows of at most `max_tokens` tokens: longest first, each into the fullest row that still holds it.

    An example longer than `max_tokens` gets a row of its own. Deterministic.
    """
    rows: list[list[Example]] = []
    free: list[int] = []
    for example in sorted(examples, key=len, reverse=True):
        fits = [i for i, room in enumerate(free) if room >= len(example)]
        if fits:
            best = min(fits, key=lambda i: free[i])
            rows[best].append(example)
            free[best] -= len(example)
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
    return max(1, round(n_examples * epochs / batch_rows))
