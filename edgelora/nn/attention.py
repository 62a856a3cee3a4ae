"""Causal attention inside the segments of a packed row, with grouped key-value heads, tile by tile.

Never builds a T x T mask or score matrix: a tile is QUERY_TILE queries of one segment against the keys before them.
The backward recomputes the probabilities of a tile from q and k (as FlashAttention does, arXiv:2205.14135).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

QUERY_TILE = 256


def _tiles(starts: list[int]) -> Iterator[tuple[int, int, int]]:
    """(segment start, first query, last query + 1) for each tile of each segment."""
    for begin, end in itertools.pairwise(starts):
        for first in range(begin, end, QUERY_TILE):
            yield begin, first, min(first + QUERY_TILE, end)


def _group(x: Tensor, kv_heads: int) -> Tensor:
    """(n, H, d) → (KV, G * n, d): the queries of the heads that share a key-value head, one after the other."""
    n, heads, d = x.shape
    return x.view(n, kv_heads, heads // kv_heads, d).permute(1, 2, 0, 3).reshape(kv_heads, -1, d)


def _ungroup(x: Tensor, n: int) -> Tensor:
    """The inverse of `_group`: (KV, G * n, d) → (n, H, d)."""
    kv_heads, rows, d = x.shape
    return x.view(kv_heads, rows // n, n, d).permute(2, 0, 1, 3).reshape(n, -1, d)


def _probabilities(q: Tensor, k: Tensor, n: int, scale: float) -> Tensor:
    """softmax of the causal scores. q (KV, G * n, d), k (KV, m, d), the last n keys belong to the n queries."""
    scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)  # (KV, G * n, m)
    kv_heads, _, m = scores.shape
    future = torch.ones(n, n, dtype=torch.bool).triu_(1)
    scores.view(kv_heads, -1, n, m)[..., m - n :].masked_fill_(future, float("-inf"))
    return scores.softmax(-1)


def _keys(x: Tensor, prefix: int, begin: int, last: int) -> Tensor:
    """What a tile may look at, (KV, m, d): the shared prefix and its own segment up to `last`."""
    own = x[begin:last]
    return (torch.cat([x[:prefix], own]) if begin >= prefix > 0 else own).transpose(0, 1)


class SegmentAttention(torch.autograd.Function):
    """q (T, H, d), k and v (T, KV, d) → (T, H, d).

    Tokens [0, prefix) are what all segments begin with; `starts` are the n + 1 borders of the segments, from `prefix`
    to T. A segment sees the prefix and itself, causally; the prefix sees itself.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: list[int], prefix: int = 0) -> Tensor:
        borders = [0, *starts] if prefix else starts
        ctx.save_for_backward(q, k, v)
        ctx.borders, ctx.prefix, ctx.scale = borders, prefix, q.shape[-1] ** -0.5
        out = torch.empty_like(q)
        for begin, first, last in _tiles(borders):
            keys, values = _keys(k, prefix, begin, last), _keys(v, prefix, begin, last)
            p = _probabilities(_group(q[first:last], k.shape[1]), keys, last - first, ctx.scale)
            out[first:last] = _ungroup(torch.bmm(p, values), last - first)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (d_out,) = grads
        q, k, v = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for begin, first, last in _tiles(ctx.borders):
            n, kv_heads = last - first, k.shape[1]
            keys, values = _keys(k, ctx.prefix, begin, last), _keys(v, ctx.prefix, begin, last)
            queries, d_rows = _group(q[first:last], kv_heads), _group(d_out[first:last], kv_heads)
            p = _probabilities(queries, keys, n, ctx.scale)  # (KV, G * n, m)
            _add(dv, torch.bmm(p.transpose(1, 2), d_rows).transpose(0, 1), begin, last)
            ds = torch.bmm(d_rows, values.transpose(1, 2)).mul_(p)
            ds.sub_(p.mul_(ds.sum(-1, keepdim=True))).mul_(ctx.scale)
            dq[first:last] = _ungroup(torch.bmm(ds, keys), n)
            _add(dk, torch.bmm(ds.transpose(1, 2), queries).transpose(0, 1), begin, last)
        return dq, dk, dv, None, None


def _add(total: Tensor, part: Tensor, begin: int, last: int) -> None:
    """Add the gradient of `_keys` to where its rows came from: the last are the segment's, the others the prefix's."""
    own = last - begin
    total[begin:last] += part[-own:]
    if len(part) > own:
        total[: len(part) - own] += part[:-own]
