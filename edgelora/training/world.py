"""The processes that work on one step. `Alone` is one of them; `distributed.py` has those that share the work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import nn

from edgelora.data.pack import Batch


class World(Protocol):
    """How the micro-batches of a step are dealt out and what they came to is put together."""

    rank: int
    size: int

    def share(self, batches: Sequence[Batch]) -> list[Batch | None]:
        """This process's micro-batches. Every process has as many: None where there are none left."""
        ...

    def sum(self, values: list[float]) -> list[float]:
        """Each value, added up over all processes."""
        ...

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make every gradient the sum of what the processes have."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        ...


class Alone:
    """One process, which does it all."""

    rank, size = 0, 1

    def share(self, batches: Sequence[Batch]) -> list[Batch | None]:
        return list(batches)

    def sum(self, values: list[float]) -> list[float]:
        return values

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        pass

    def any(self, flag: bool) -> bool:
        return flag
