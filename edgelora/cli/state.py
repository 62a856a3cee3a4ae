"""What the global options said."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class State:
    """What was said before the name of the command."""

    debug: bool = False


state = State()
