"""Causal attention inside the segments of a packed row, with grouped key-value heads and windows, tile by tile.

Never builds a T x T mask or score matrix: a tile is QUERY_TILE queries of one segment against the keys before them.
The backward recomputes the probabilities of a tile from q and k (as FlashAttention does, arXiv:2205.14135). Scores and
sums are float32 also where q, k and v are narrower: they are the part of a step that bears it least. On a CPU compiled
code does it (`flash.py`), on an NVIDIA GPU in narrow numbers torch's FlashAttention (`gpu_attention.py`): both round
the factors of products to bfloat16 where q, k and v are and the hardware multiplies such. What stands here does it
through torch, on any device and in any dtype, with all of a tile in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from edgelora.nn import compiled, flash, gpu_attention
from edgelora.nn.scores import Scores, bent, slope_of_bent

QUERY_TILE = 128  # of 9 heads and 1024 keys: 5 MiB of scores. With 256 a row of 1024 took twice as long


def _tiles(starts: list[int]) -> Iterator[tuple[int, int, int]]:
    """(segment start, first query, last query + 1) for each tile of each segment."""
    for begin, end in itertools.pairwise(starts):
        for first in range(begin, end, QUERY_TILE):
            yield begin, first, min(first + QUERY_TILE, end)


def _wide(x: Tensor) -> Tensor:
    """float32 of anything narrower, laid out as its shape says."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.contiguous() if x.dtype == dtype else x.to(dtype, memory_format=torch.contiguous_format)


def _group(x: Tensor, kv_heads: int) -> Tensor:
    """(n, H, d) → (KV, G * n, d): the queries of the heads that share a key-value head, one after the other."""
    d = x.shape[-1]
    return _wide(x.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)).view(kv_heads, -1, d)


def _ungroup(x: Tensor, n: int) -> Tensor:
    """The inverse of `_group`: (KV, G * n, d) → (n, H, d)."""
    kv_heads, rows, d = x.shape
    return x.view(kv_heads, rows // n, n, d).permute(2, 0, 1, 3).reshape(n, -1, d)


def _scores(q: Tensor, k: Tensor, how: Scores) -> Tensor:
    """q (KV, G * n, d), times how.scale already, and k (KV, m, d) → (KV, G * n, m)."""
    return bent(torch.bmm(q, k.transpose(1, 2)), how.softcap)


def _hide(scores: Tensor, n: int, window: int | None) -> Tensor:
    """Mask, in place, what the n queries may not see. Their own keys are the last n of the m (KV, G * n, m)."""
    kv_heads, _, m = scores.shape
    view = scores.view(kv_heads, -1, n, m)
    if window is None or window >= m:
        view[..., m - n :].add_(_unseen(n, n, n, scores.dtype, scores.device))
    else:
        view.add_(_unseen(n, m, window, scores.dtype, scores.device))
    return scores


@lru_cache(maxsize=64)  # every layer asks for the same few
def _unseen(n: int, m: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(n, m): −inf where the last n of m tokens may not look, else 0."""
    everything = torch.ones(n, m, dtype=torch.bool, device=device)
    hidden = everything.triu(m - n + 1) | everything.tril_(m - n - window)
    return torch.zeros(n, m, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


def _seen(prefix: int, begin: int, first: int, last: int, window: int | None) -> list[slice]:
    """The tokens whose keys the queries [first, last) of a segment may need: of the shared prefix, and of its own."""
    shared = prefix if begin >= prefix else 0
    lowest = 0 if window is None else max(0, shared + first - begin - window + 1)  # by position
    own = slice(begin + max(0, lowest - shared), last)
    return [slice(lowest, shared), own] if lowest < shared else [own]


def _keys(x: Tensor, seen: list[slice]) -> Tensor:
    """(T, KV, d) → (KV, m, d)."""
    return _wide((x[seen[0]] if len(seen) == 1 else torch.cat([x[part] for part in seen])).transpose(0, 1))


class SegmentAttention(torch.autograd.Function):
    """q (T, H, d), k and v (T, KV, d) → (T, H, d).

    Tokens [0, prefix) are what all segments begin with; `starts` are the n + 1 borders of the segments, from `prefix`
    to T. A segment sees the prefix and itself, causally; the prefix sees itself.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: list[int], prefix: int, how: Scores) -> Tensor:
        ctx.how = [0, *starts] if prefix else starts, prefix, how
        assert not isinstance(starts, gpu_attention.Borders) or gpu_attention.usable(how, q, k, v)
        if compiled.usable(q, k, v):
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
            out, lse = flash.Problem(q, k, v, *ctx.how).forward()
            ctx.save_for_backward(q, k, v, out, lse)
        elif gpu_attention.usable(how, q, k, v):
            out, lse = gpu_attention.Problem(q, k, v, *ctx.how).forward()
            ctx.save_for_backward(q, k, v, out, lse)
        else:
            out = _forward(q, k, v, *ctx.how)
            ctx.save_for_backward(q, k, v)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v, *found = ctx.saved_tensors
        if found:
            out, lse = found
            problem = gpu_attention.Problem if q.is_cuda else flash.Problem
            d_qkv = problem(q, k, v, *ctx.how).backward(out, lse, grads[0].contiguous())
            return *d_qkv, None, None, None
        return *_backward(q, k, v, grads[0], *ctx.how), None, None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, borders: list[int], prefix: int, how: Scores) -> Tensor:
    out = torch.empty_like(q)
    for begin, first, last in _tiles(borders):
        seen, n = _seen(prefix, begin, first, last, how.window), last - first
        scores = _scores(_group(q[first:last], k.shape[1]) * how.scale, _keys(k, seen), how)
        p = _hide(scores, n, how.window).softmax(-1)
        out[first:last] = _ungroup(torch.bmm(p, _keys(v, seen)), n)
    return out


def _backward(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, borders: list[int], prefix: int, how: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    dq, (dk, dv) = torch.empty_like(q), (_wide(torch.zeros_like(x)) for x in (k, v))
    for begin, first, last in _tiles(borders):
        seen, n, kv_heads = _seen(prefix, begin, first, last, how.window), last - first, k.shape[1]
        keys, values = _keys(k, seen), _keys(v, seen)
        queries, d_rows = _group(q[first:last], kv_heads) * how.scale, _group(d_out[first:last], kv_heads)
        scores = _scores(queries, keys, how)
        slope = slope_of_bent(scores, how.softcap)
        p = _hide(scores, n, how.window).softmax(-1)  # (KV, G * n, m)
        _add(dv, torch.bmm(p.transpose(1, 2), d_rows).transpose(0, 1), seen)
        dp = torch.bmm(d_rows, values.transpose(1, 2))
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
        if slope is not None:
            ds.mul_(slope)
        dq[first:last] = _ungroup(torch.bmm(ds, keys).mul_(how.scale), n)
        _add(dk, torch.bmm(ds.transpose(1, 2), queries).transpose(0, 1), seen)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _add(total: Tensor, part: Tensor, seen: list[slice]) -> None:
    """Add the gradient of `_keys` to where its rows came from."""
    at = 0
    for rows in seen:
        total[rows] += part[at : at + rows.stop - rows.start]
        at += rows.stop - rows.start
