"""An adapter as a person names it: `home`, `home:0.7`. What cannot be is refused with what was probably meant.

Two rules: a name that is typed in a chat, and one in the store, which a file may have on every system.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from pathlib import Path

from edgelora.errors import AdapterError, ConfigError, EngineError
from runtime.service import MAX_SCALE

BASE = "base"  # what the model without any adapter is called
TYPED = re.compile(r"\w[\w.-]*")
STORED = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def unknown_adapter(name: str, known: Iterable[str]) -> AdapterError:
    """Raised for a name that is not loaded; offers the nearest that is."""
    names = list(known)
    near = difflib.get_close_matches(name, names, 1)
    return AdapterError(
        what=f"no adapter named {name}" + (f", did you mean {near[0]}?" if near else ""),
        why=f"loaded are: {', '.join(names) or 'none'}",
        fix="load it first: /load FILE NAME, or --adapter NAME=FILE",
    )


def require_scale(scale: float, name: str) -> None:
    """Raise EngineError for a scale of `name` at which a model answers noise; NaN is one."""
    if not abs(scale) <= MAX_SCALE:
        raise EngineError(
            what=f"scale {scale:g} for {name}",
            why=f"beyond ±{MAX_SCALE:g} (and for NaN) a model answers noise",
            fix="use a scale around 1",
        )


def name_of(path: Path) -> str:
    """What an adapter's file is called where nobody gave it a name: its stem, blanks and signs replaced by `-`."""
    return re.sub(r"[^\w.-]", "-", path.stem)


def require_name(name: str) -> str:
    """`name`, if one can type it in a chat. Raises ConfigError."""
    if not TYPED.fullmatch(name) or name == BASE:
        raise ConfigError(
            what=f"{name or 'an empty text'} is no name for an adapter",
            why=f"you type it in chat: letters, digits, '-', '_' and '.' are allowed, and {BASE} is the model itself",
            fix="choose another name",
        )
    return name


def stored_name_of(path: Path) -> str:
    """What an adapter's file is stored as where nobody gave it a name: `My Home.gguf` → my-home."""
    return re.sub(r"[^a-z0-9._-]+", "-", path.stem.lower()).lstrip("._-")[:64]


def require_stored_name(name: str) -> None:
    """Raise ConfigError unless an adapter may be stored under this name."""
    if not STORED.fullmatch(name):
        raise ConfigError(
            what=f"{name!r} is no name for an adapter",
            why="it begins with a small letter or a digit, goes on with these and '.', '_', '-', and has at most 64",
            fix="choose another one, such as home or poet-2",
        )


def scaled_name(word: str) -> tuple[str, float | None]:
    """`home:0.7` → (home, 0.7); without a number there is no scale. Raises ConfigError."""
    name, _, number = word.partition(":")
    return name, read_scale(number) if number else None


def read_scale(number: str) -> float:
    """A scale as it is typed. Raises ConfigError."""
    try:
        scale = float(number)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise ConfigError(f"{number} is no number", "a scale is a number such as 0.7", "/use NAME:0.7")
    return scale
