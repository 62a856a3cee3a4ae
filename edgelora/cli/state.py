"""What the global options said."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class State:
    debug: bool = False


state = State()
