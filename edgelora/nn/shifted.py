"""Shifted sparse attention (S²-Attn of LongLoRA, arXiv:2309.12307, section 3.2): a token sees its group alone.

A segment is cut into groups of G tokens for one half of the heads, and half a group further on for the other half, so
that what one knows comes to its neighbours through the other. At the ends of a segment the halves of a group stand
alone: the authors put both into one group, and mask what would look ahead. It costs T·G instead of T².
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from edgelora.nn.attention import SegmentAttention
from edgelora.nn.scores import Scores


def borders(starts: Sequence[int], group: int, first: int) -> list[int]:
    """The borders of all groups of segments with these borders, the first group of each being of `first` tokens."""
    cut = [starts[0]]
    for begin, end in itertools.pairwise(starts):
        cut += [*range(begin + first, end, group), end]
    return cut


def shifted_attention(q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], group: int, how: Scores) -> Tensor:
    """q (T, H, d), k and v (T, KV, d) → (T, H, d), of segments that share nothing.

    The first ⌊KV / 2⌋ key-value heads and their queries are those that are not shifted; where there is one such head,
    half of its queries.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    keys = max(1, kv_heads // 2)
    queries = heads // 2 if kv_heads == 1 else keys * (heads // kv_heads)
    other = 0 if kv_heads == 1 else keys
    still, moved = (borders(starts, group, first) for first in (group, max(1, group // 2)))
    parts = [(q[:, :queries], k[:, :keys], v[:, :keys], still), (q[:, queries:], k[:, other:], v[:, other:], moved)]
    return torch.cat([SegmentAttention.apply(*qkv, cut, 0, how) for *qkv, cut in parts if qkv[0].shape[1]], 1)
