"""A value of a GGUF file that is known only when the file is written: its place is reserved, and filled later."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from gguf.constants import GGUFValueType

from edgelora.errors import OutputError
from edgelora.files.gguf import GGUFFile
from edgelora.files.gguf_values import SCALARS


def reserve(n_bytes: int) -> str:
    """A text of spaces to be replaced by `fill_reserved` once what belongs there is known."""
    return " " * n_bytes


def fill_reserved(path: Path, key: str, value: str | float) -> None:
    """Replace the reserved value of `key` in the GGUF at `path`, in place; the file keeps its size.

    Raises OutputError if a text does not fit, and ValueError if the key is of another kind.
    """
    place = GGUFFile(path).metadata[key]
    if isinstance(value, str) and place.type == GGUFValueType.STRING:
        room, raw = len(place.data.encode()), value.encode()
        if len(raw) > room:
            raise OutputError(
                what=f"{path}: {key}: {len(raw)} bytes do not fit into the {room} reserved",
                why="the place for it is left when the file is written, and the file keeps its size",
                fix="this is a fault of edgelora: please report it, with the command",
            )
        raw = raw.ljust(room)
    elif not isinstance(value, str) and place.type in SCALARS:
        raw = np.array(value).astype(SCALARS[place.type]).tobytes()
    else:
        raise ValueError(f"{key}: {value!r} is no {place.type.name}")
    with path.open("r+b") as f:
        f.seek(place.end - len(raw))
        f.write(raw)
        f.flush()
        os.fsync(f.fileno())
