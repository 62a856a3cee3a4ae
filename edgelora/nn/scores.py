"""How queries meet keys in attention, and the bend that Gemma 2 gives to these scores and to logits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Scores(NamedTuple):
    """How queries meet keys: score = scale · q·k, bent below `softcap`; a token sees `window` tokens, itself included.

    None: no cap (Gemma 2 has one), no window.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


def bent(x: Tensor, softcap: float | None) -> Tensor:
    """softcap · tanh(x / softcap), in the memory of x; x as it is without a cap."""
    return x if softcap is None else x.div_(softcap).tanh_().mul_(softcap)


def slope_of_bent(x: Tensor, softcap: float | None) -> Tensor | None:
    """What a gradient of values x that were `bent` is multiplied by, on its way to what they were before."""
    return None if softcap is None else 1 - (x / softcap).square_()
