"""Virtual tokens: what stands before every sequence and is no token, embeddings or a layer's keys and values.

To a packed row they are what a shared beginning is (see `data/pack.py`): there once, and seen by every segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]
"""Of one attention layer, (n, KV, d_head) each, as attention reads them: keys are not rotated any more."""


@dataclass(frozen=True)
class Row:
    """A packed row inside the decoder: x (T, d), positions (T,), borders, how many tokens all segments begin with."""

    x: Tensor
    positions: Tensor
    starts: list[int]
    prefix: int


@dataclass(frozen=True)
class Virtual:
    """`length` n of them, at the positions 0 to n − 1: `embeddings` (n, d), which go into the first layer, or of each
    layer its `past`."""

    length: int
    embeddings: Tensor | None = None
    past: Sequence[KeysValues] = ()

    @property
    def rows(self) -> int:
        """How many of them every layer computes."""
        return 0 if self.embeddings is None else self.length

    def before(self, row: Row) -> Row:
        """The row behind them; its first `rows` are theirs."""
        if not self.length:
            return row
        behind = replace(row, positions=row.positions + self.length)
        if self.embeddings is None:
            return behind
        own = torch.arange(self.length, device=row.positions.device)
        return Row(
            torch.cat([self.embeddings.to(row.x.dtype), row.x]),
            torch.cat([own, behind.positions]),
            *shifted(row.starts, row.prefix, self.length),
        )

    def of_layers(self, n_layers: int) -> list[KeysValues | None]:
        """What each layer finds before its row."""
        return [*self.past] if self.past else [None] * n_layers


NOTHING = Virtual(0)


class Before(nn.Module):
    """Makes `length` virtual tokens, anew for every row: what is trained of them are its parameters."""

    length: int

    def forward(self) -> Virtual:
        raise NotImplementedError

    def begin(self, real: Virtual) -> None:
        """Become what the model makes of as many real tokens, before anything is learned."""
        raise NotImplementedError


class Given(Before):
    """Always the same ones, of which nothing is trained."""

    def __init__(self, virtual: Virtual) -> None:
        super().__init__()
        self.virtual, self.length = virtual, virtual.length

    def forward(self) -> Virtual:
        return self.virtual


def shifted(starts: list[int], prefix: int, n: int) -> tuple[list[int], int]:
    """Borders and shared beginning of a row with n more positions before it, which every segment sees.

    A sequence that is alone is one segment with them: some models rotate it by its whole length.
    """
    if prefix == 0 and len(starts) == 2:
        return [0, starts[1] + n], 0
    return [start + n for start in starts], prefix + n


def behind_past(
    q: Tensor, k: Tensor, v: Tensor, past: KeysValues, starts: list[int], prefix: int
) -> tuple[Tensor, Tensor, Tensor, list[int], int]:
    """What attention gets of a row q (T, H, d), k and v (T, KV, d) behind `past`: n more of each, whose queries are
    zeros, for a segment has as many queries as keys. The first n answers are nobody's."""
    keys, values = (part.to(k.dtype) for part in past)
    n = len(keys)
    q = torch.cat([q.new_zeros(n, *q.shape[1:]), q])
    return q, torch.cat([keys, k]), torch.cat([values, v]), *shifted(starts, prefix, n)
