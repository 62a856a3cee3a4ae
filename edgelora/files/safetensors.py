"""Read a safetensors file of floats without trusting it: types, shapes and offsets are checked before any is used."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgelora.errors import FileFormatError

MAX_HEADER_BYTES = 100 << 20
MAX_DIMS = 8
FLOATS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def read_floats(path: Path) -> dict[str, np.ndarray]:
    """Every tensor as float32. Raises FileFormatError for a broken file and for tensors that are not floats."""
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise _fault(path, f"it cannot be read ({e.strerror})") from e
    length = struct.unpack("<Q", raw[:8])[0] if len(raw) >= 8 else 0
    if not 2 <= length <= min(MAX_HEADER_BYTES, len(raw) - 8):
        raise _fault(path, "it is shorter than the header it announces")
    try:
        header = json.loads(raw[8 : 8 + length])
    except (ValueError, RecursionError) as e:
        raise _fault(path, "its header is not JSON") from e
    if not isinstance(header, dict):
        raise _fault(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    data = memoryview(raw)[8 + length :]
    entries = {name: _entry(path, name, entry, len(data)) for name, entry in header.items()}
    if sum(e.end - e.start for e in entries.values()) > len(data):
        raise _fault(path, "its tensors overlap")
    return {name: _floats(data, e) for name, e in entries.items()}


@dataclass(frozen=True)
class _Entry:
    """A tensor's type, shape and its bytes [start, end) in the data, all checked."""

    code: str
    shape: tuple[int, ...]
    start: int
    end: int


def _entry(path: Path, name: str, entry: Any, size: int) -> _Entry:
    try:
        code, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if (
            not isinstance(shape, list)
            or len(shape) > MAX_DIMS
            or not all(type(n) is int for n in (*shape, start, end))
        ):
            raise ValueError
        if code not in FLOATS:
            raise _fault(path, f"tensor {name} is of type {code}, not F32, F16 or BF16")
        elements = 1
        for n in shape:
            elements *= n
        if (
            not all(0 <= n <= size for n in shape)
            or not 0 <= start <= end <= size
            or end - start != elements * np.dtype(FLOATS[code]).itemsize
        ):
            raise ValueError
    except (KeyError, TypeError, ValueError) as e:
        raise _fault(path, f"tensor {name} does not lie inside the file as its header says") from e
    return _Entry(code, tuple(shape), start, end)


def _floats(data: memoryview, e: _Entry) -> np.ndarray:
    flat = np.frombuffer(data[e.start : e.end], np.dtype(FLOATS[e.code]))
    if e.code == "BF16":
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    return flat.astype(np.float32).reshape(e.shape)


def _fault(path: Path, why: str) -> FileFormatError:
    return FileFormatError(
        what=f"{path}: not a usable safetensors file", why=why, fix="train or download the adapter again"
    )
