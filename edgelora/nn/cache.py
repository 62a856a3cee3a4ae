"""Keys and values that were computed before, so that a sequence grows by a token at the cost of a token."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from edgelora.nn.attention import SegmentAttention
from edgelora.nn.scores import Scores


class KeyValues:
    """Keys and values of one attention layer, (m, KV, d) for each sequence of a packed row; no more than its window.
    What all of them begin with stands in each.

    The first row fills it with whole sequences; every later one has the next token of each, in the same order. Keys
    lie here rotated.
    """

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    @property
    def begun(self) -> bool:
        """Whether it has seen its first row."""
        return bool(self._keys)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, starts: list[int], prefix: int, how: Scores) -> Tensor:
        """`SegmentAttention.apply`, over what is here too. q (T, H, d), k and v (T, KV, d) → (T, H, d)."""
        if not self.begun:
            parts = [[*range(prefix), *range(a, b)][-(how.window or 0) :] for a, b in itertools.pairwise(starts)]
            self._keys, self._values = [k[part] for part in parts], [v[part] for part in parts]  # copies, no views
            out: Tensor = SegmentAttention.apply(q, k, v, starts, prefix, how)
            return out
        self._keys, self._values = _grown(self._keys, k, how.window), _grown(self._values, v, how.window)
        one_by_one = zip(q, self._keys, self._values, strict=True)
        return torch.stack([_look_back(query, keys, values, how) for query, keys, values in one_by_one])

    def keep(self, sequences: list[int]) -> None:
        """Forget all but these sequences, by their place."""
        self._keys, self._values = [self._keys[i] for i in sequences], [self._values[i] for i in sequences]


def _grown(kept: list[Tensor], new: Tensor, window: int | None) -> list[Tensor]:
    return [torch.cat([old, row[None]])[-(window or 0) :] for old, row in zip(kept, new, strict=True)]


def _look_back(q: Tensor, k: Tensor, v: Tensor, how: Scores) -> Tensor:
    """The last token of a sequence sees everything in its window: q (H, d), k and v (m, KV, d) → (H, d).

    Computed in float32 also where they are narrower, as SegmentAttention does.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.to(wide).unflatten(0, (k.shape[1], -1))  # (KV, G, d)
    scores = torch.einsum("kgd,mkd->kgm", groups, k.to(wide)) * how.scale
    if how.softcap is not None:
        scores = (scores / how.softcap).tanh() * how.softcap
    return torch.einsum("kgm,mkd->kgd", scores.softmax(-1), v.to(wide)).flatten(0, 1).to(q.dtype)
