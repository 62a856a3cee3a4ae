"""Attention on an NVIDIA GPU by the FlashAttention that torch comes with (arXiv:2307.08691), segment by segment.

torch offers it to autograd through an interface that changes from version to version; what stands below that one,
`aten::_flash_attention_forward` and `_backward`, has stayed. Where it cannot be used (`usable`), attention.py computes
the same tile by tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from edgelora.nn.gpu import has_triton
from edgelora.nn.scores import Scores

WIDEST_HEAD = 256


def usable(how: Scores, *tensors: Tensor) -> bool:
    """Whether it takes these: narrow numbers on an Ampere card or a later one, and scores that are not bent."""
    q = tensors[0]
    return (
        has_triton(q.device) and takes(how, q.shape[-1], q.dtype) and all(x.dtype == q.dtype for x in tensors)
    )  # fmt: skip


def takes(how: Scores, head_dim: int, dtype: torch.dtype) -> bool:
    """As `usable`, asked before there are any tensors."""
    narrow = dtype in (torch.bfloat16, torch.float16)
    return narrow and how.softcap is None and head_dim % 8 == 0 and head_dim <= WIDEST_HEAD


class Segments(NamedTuple):
    """Where segments begin, as the kernels take it: int32 (n + 1,) of queries and of keys, the longest of each.

    rows: where keys come from if segments share a prefix, which is then copied before each of them (M,), else None.
    """

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int
    rows: Tensor | None


class Places(NamedTuple):
    """`Segments` before they are on a card."""

    queries: list[int]
    keys: list[int]
    longest_query: int
    longest_key: int
    rows: list[int] | None


def places_of(borders: Sequence[int], prefix: int) -> Places:
    """Of a packed row; with a prefix, it is the first of the segments."""
    queries = [*borders]
    lengths = [b - a for a, b in itertools.pairwise(queries)]
    if not prefix:
        return Places(queries, queries, max(lengths), max(lengths), None)
    seen = [lengths[0], *(prefix + n for n in lengths[1:])]
    rows = [*range(prefix)]
    for begin, end in itertools.pairwise(queries[1:]):
        rows += [*range(prefix), *range(begin, end)]
    return Places(queries, [*itertools.accumulate(seen, initial=0)], max(lengths), max(seen), rows)


class Borders(list[int]):
    """Borders of segments that stand on the card, where they can become others: who has these asks no further."""

    def __init__(self, places: Segments, n_tokens: int) -> None:
        super().__init__([0, n_tokens])
        self.places = places


@lru_cache(maxsize=16)  # every layer asks for the same
def segments(borders: tuple[int, ...], prefix: int, device: torch.device) -> Segments:
    """`places_of` on the device."""
    row = places_of(borders, prefix)
    queries = torch.tensor(row.queries, dtype=torch.int32, device=device)
    keys = queries if row.rows is None else torch.tensor(row.keys, dtype=torch.int32, device=device)
    rows = None if row.rows is None else torch.tensor(row.rows, device=device)
    return Segments(queries, keys, row.longest_query, row.longest_key, rows)


class Problem:
    """A packed row's attention: q (T, H, d), k and v (T, KV, d), as `flash.Problem`."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, borders: list[int], prefix: int, how: Scores) -> None:
        self.places = borders.places if isinstance(borders, Borders) else segments(tuple(borders), prefix, q.device)
        self.n_tokens = len(k)
        rows = self.places.rows
        self.q = q
        self.k, self.v = (x if rows is None else x[rows] for x in (k, v))
        # a query sees itself and so many keys before it
        self.window = {} if how.window is None else {"window_size_left": how.window - 1, "window_size_right": 0}
        self.how = how

    def forward(self) -> tuple[Tensor, Tensor]:
        """The output (T, H, d), and log Σ exp of each query's scores, float32 (H, T)."""
        p = self.places
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            self.q, self.k, self.v, p.queries, p.keys, p.longest_query, p.longest_key, 0.0, True, False,
            scale=self.how.scale, **self.window,
        )  # fmt: skip
        return out, lse

    def backward(self, out: Tensor, lse: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k and v."""
        p = self.places
        no_dropout = torch.empty(2, dtype=torch.uint64, device=self.q.device), torch.empty((), device=self.q.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            d_out, self.q, self.k, self.v, out, lse, p.queries, p.keys, p.longest_query, p.longest_key, 0.0, True,
            *no_dropout, scale=self.how.scale, **self.window,
        )  # fmt: skip
        return dq, self._gathered(dk), self._gathered(dv)

    def _gathered(self, d: Tensor) -> Tensor:
        """The gradients (M, KV, d) of keys or values back where they came from, (T, KV, d)."""
        if self.places.rows is None:
            return d
        total = torch.zeros(self.n_tokens, *d.shape[1:], dtype=torch.float32, device=d.device)
        return total.index_add_(0, self.places.rows, d.float()).to(d.dtype)
