"""Read a safetensors file of floats without trusting it: offsets are checked before any memory is taken."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from edgelora.errors import FileFormatError

MAX_HEADER_BYTES = 100 << 20
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
    return {name: _tensor(path, name, entry, data) for name, entry in header.items()}


def _tensor(path: Path, name: str, entry: Any, data: memoryview) -> np.ndarray:
    try:
        code, shape, (start, end) = entry["dtype"], [int(n) for n in entry["shape"]], entry["data_offsets"]
        dtype = np.dtype(FLOATS[code])
        elements = 1
        for n in shape:
            elements *= n
        if min(shape, default=0) < 0 or not 0 <= start <= end <= len(data) or end - start != elements * dtype.itemsize:
            raise ValueError
    except KeyError as e:
        raise _fault(path, f"tensor {name} is of type {e.args[0]}, not F32, F16 or BF16") from e
    except (TypeError, ValueError) as e:
        raise _fault(path, f"tensor {name} does not lie inside the file as its header says") from e
    flat = np.frombuffer(data[start:end], dtype)
    if code == "BF16":
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    return flat.astype(np.float32).reshape(shape)


def _fault(path: Path, why: str) -> FileFormatError:
    return FileFormatError(
        what=f"{path}: not a usable safetensors file", why=why, fix="train or download the adapter again"
    )
