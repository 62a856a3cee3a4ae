"""What a worker and its child say to each other: pickled dataclasses over a pipe of which both ends are ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgelora.device import Choice
from edgelora.errors import EdgeloraError
from runtime.service import EngineConfig, Piece, Request, Service

Factory = Callable[[Path, EngineConfig], Service]
"""What the child opens its engine with: a module's function, for it goes to the child by its name."""


# -- to the child; `number` is what the answers to it carry -----------------------------------------------------------


@dataclass(frozen=True)
class Open:
    """The first message: make the service. Answered by Result(Opened)."""

    number: int
    factory: Factory
    base: Path
    config: EngineConfig


@dataclass(frozen=True)
class Call:
    """A method of the service that returns once. Answered by Result."""

    number: int
    method: Literal["load", "unload", "close"]
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Ask:
    """Answer a request. Answered by Accepted, Said for each piece, and Result(Usage)."""

    number: int
    request: Request
    window: int
    """So many pieces may be sent; after that each needs a More."""


@dataclass(frozen=True)
class More:
    """The reader of a stream has taken so many pieces."""

    number: int
    pieces: int


@dataclass(frozen=True)
class Cancel:
    """The reader of a stream has had enough. Its Result comes all the same."""

    number: int


ToChild = Open | Call | Ask | More | Cancel


# -- from the child ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """The service stands."""

    name: str
    threads: Choice


@dataclass(frozen=True)
class Accepted:
    """`generate` has returned a stream."""

    number: int


@dataclass(frozen=True)
class Said:
    """A piece of an answer."""

    number: int
    piece: Piece


@dataclass(frozen=True)
class Result:
    """What was asked for is there; nothing more comes under this number."""

    number: int
    value: Any


@dataclass(frozen=True)
class Fault:
    """What was asked for raised this; nothing more comes under this number."""

    number: int
    error: EdgeloraError


FromChild = Accepted | Said | Result | Fault
