"""Rows of preference data once they are encoded: what DPO, IPO, ORPO and KTO learn from."""

from __future__ import annotations

from dataclasses import dataclass

from edgelora.data.encode import Example


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt. Both begin with the prompt's tokens; each learns its own answer."""

    chosen: Example
    rejected: Example


@dataclass(frozen=True)
class Labelled:
    """One answer, and whether it is one to give."""

    example: Example
    desirable: bool
