"""The embedding or the head, of which an adapter can put other rows in the place of a few tokens'."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from edgelora.nn.linear import Weight


class NewRows(Protocol):
    """What an adapter puts in the place of the rows of some tokens: `ids` (k,), `rows` float32 (k, d)."""

    @property
    def ids(self) -> Tensor: ...

    @property
    def rows(self) -> Tensor: ...

    def tensors(self) -> dict[str, Tensor]:
        """What is saved of it, by PEFT's names."""
        ...


class Vocabulary(nn.Module):
    """A row for each token, (V, d), or its `delta`'s where that has one."""

    delta: NewRows | None

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.weight, self.delta = weight, None

    def forward(self, ids: Tensor) -> Tensor:
        """ids (T,) → float32 (T, d)."""
        x = self.weight.gather(ids)
        if self.delta is None:
            return x
        at, which = (ids[:, None] == self.delta.ids).nonzero(as_tuple=True)  # (T, k), of a few tokens
        return x.index_put((at,), self.delta.rows[which])
