"""What a method does around the optimizer's steps, beside its formula: nothing, unless its row of METHODS says so."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from edgelora.nn.linear import Delta


class Around:
    """Called by the training loop with every delta. What it remembers stands in the deltas, and so in checkpoints."""

    def draw(self, deltas: Sequence[Delta], generator: torch.Generator | None) -> None:
        """Before a micro-batch: what is drawn for it. None: take it back, what follows is measured."""

    def regularize(self, deltas: Sequence[Delta]) -> None:
        """Add to the summed gradients of a step those of a term of the loss that no row takes part in."""

    def allot(self, deltas: Sequence[Delta], step: int, total: int) -> None:
        """Behind the optimizer's step, the `step`-th of `total` (from 1), while its gradients are there."""


NOTHING = Around()
