"""The processes that work on one step. `Alone` is one of them; `distributed.py` has those that share the work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import nn

from edgelora.data.pack import Batch
from edgelora.device import card_of

T = TypeVar("T")


class World(Protocol):
    """How the micro-batches of a step are dealt out and what they came to is put together.

    rank: 0 … size - 1; the first process, 0, is the one that writes and talks. local_rank, local_size: among those on
    this machine. All processes must come to the same calls in the same order.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int

    def use(self, device: str) -> None:
        """Compute on `device`, `cuda` being this process's own card. Raises ConfigError if there is none for it."""
        ...

    def share(self, batches: Sequence[Batch]) -> list[Batch | None]:
        """This process's micro-batches: every `size`-th from number `rank` on.

        Every process has as many: None where there are none left.
        """
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

    def first(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process; it runs in no other."""
        ...


class Alone:
    """One process, which does it all."""

    rank, size = 0, 1
    local_rank, local_size = 0, 1

    def use(self, device: str) -> None:
        if device.startswith("cuda"):
            # kernels are launched on the card that torch computes on, not on that of their tensors
            torch.cuda.set_device(card_of(device))

    def share(self, batches: Sequence[Batch]) -> list[Batch | None]:
        return list(batches)

    def sum(self, values: list[float]) -> list[float]:
        return values

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        pass

    def any(self, flag: bool) -> bool:
        return flag

    def first(self, make: Callable[[], T]) -> T:
        return make()
