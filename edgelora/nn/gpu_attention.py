"""Attention on an NVIDIA GPU by the FlashAttention that torch comes with (arXiv:2307.08691), segment by segment.

torch offers it to autograd through an interface that changes from version to version; what stands below that one,
`aten::_flash_attention_forward` and `_backward`, has stayed. Where it cannot be used (`usable`), attention.py computes
the same tile by tile.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edgelora.nn.gpu import has_triton
from edgelora.nn.scores import Scores

WIDEST_HEAD = 256


def usable(how: Scores, *tensors: Tensor) -> bool:
    """Whether it takes these: narrow numbers on an Ampere card or a later one, and scores that are not bent."""
    q = tensors[0]
    return (
        has_triton(q.device) and how.softcap is None and q.shape[-1] % 8 == 0 and q.shape[-1] <= WIDEST_HEAD
        and all(x.dtype == q.dtype and x.dtype in (torch.bfloat16, torch.float16) for x in tensors)
    )  # fmt: skip


class Segments(NamedTuple):
    """Where segments begin, as the kernels take it: int32 (n + 1,) of queries and of keys, the longest of each.

    rows: where keys come from if segments share a prefix, which is then copied before each of them (M,), else None.
    """

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int
    rows: Tensor | None


@lru_cache(maxsize=16)  # every layer asks for the same
def segments(borders: tuple[int, ...], prefix: int, device: torch.device) -> Segments:
    """Of a packed row; with a prefix, it is the first of the segments."""

    def on_device(values: Any) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=device)

    lengths = [b - a for a, b in itertools.pairwise(borders)]
    queries = on_device(borders)
    if not prefix:
        return Segments(queries, queries, max(lengths), max(lengths), None)
    seen = [lengths[0], *(prefix + n for n in lengths[1:])]
    rows = [*range(prefix)]
    for begin, end in itertools.pairwise(borders[1:]):
        rows += [*range(prefix), *range(begin, end)]
    keys = on_device(itertools.accumulate(seen, initial=0))
    return Segments(queries, keys, max(lengths), max(seen), torch.tensor(rows, device=device))


class Problem:
    """A packed row's attention: q (T, H, d), k and v (T, KV, d), as `flash.Problem`."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, borders: list[int], prefix: int, how: Scores) -> None:
        self.places = segments(tuple(borders), prefix, q.device)
        self.n_tokens, self.prefix = len(k), prefix
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
