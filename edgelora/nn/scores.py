"""How queries meet keys in attention."""

from __future__ import annotations

from typing import NamedTuple


class Scores(NamedTuple):
    """How queries meet keys: score = scale · q·k, bent below `softcap`; a token sees `window` tokens, itself included.

    None: no cap (Gemma 2 has one), no window.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
