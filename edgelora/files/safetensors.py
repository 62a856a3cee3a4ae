"""Read a safetensors file without trusting it: the whole header is checked on opening, tensor data stays memory-mapped.

Stricter than the format where two readers could differ: a name stands once, and every byte belongs to one tensor.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgelora.errors import FileFormatError
from edgelora.files.mapped import forget

MAX_HEADER_BYTES = 8 << 20  # the format allows 100 MB, which names of 60,000 tensors do not need
MAX_TENSORS = 65_536
MAX_NAME = 1000
MAX_DIMS = 8
MAX_EXTENT = 1 << 56  # of a shape whose zeros count as ones: numpy refuses sizes beyond 2^63 bytes even when empty

DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
FLOATS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}

# What Python may spend in bytes on the value, name, list or table that such a sign in a JSON text stands for.
JSON_COSTS = {b",": 112, b":": 40, b"[": 128, b"{": 128}
MAX_JSON_COST_BYTES = 240 << 20  # Gemma 3: 262,144 tokens and 514,906 merges in its tokenizer.json come to 218 << 20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: `dtype` as the file writes it (`BF16`), `offset` in bytes from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


class SafetensorsFile:
    """An open, checked safetensors file: `tensors` and `metadata` by name, `rows(name)` for the mapped bytes.

    Raises FileFormatError for anything that is not a whole, well-formed file. Reads the header and nothing else.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._mapped = self._map()
        self._bytes = np.frombuffer(self._mapped, np.uint8)
        self.size_bytes = len(self._bytes)
        self._data_start = 8 + self._header_length()
        header = self._parse(self._bytes[8 : self._data_start].tobytes())
        self.metadata: dict[str, str] = self._texts(header.pop("__metadata__", None))
        if len(header) > MAX_TENSORS:
            raise self._fault(f"{len(header)} tensors (at most {MAX_TENSORS} are read)")
        self.tensors: dict[str, StoredTensor] = {name: self._tensor(name, entry) for name, entry in header.items()}
        self._check_layout()

    def rows(self, name: str) -> np.ndarray:
        """The bytes of a tensor of floats as uint8 (n_rows, bytes per row), mapped, not copied.

        A row runs along the last dimension; a vector and a scalar are one row. Raises FileFormatError for a tensor
        that is not F32, F16 or BF16.
        """
        t = self.tensors[name]
        if t.dtype not in FLOATS:
            raise self._fault(f"tensor {name} is of type {t.dtype}, not F32, F16 or BF16")
        flat = self._bytes[t.offset : t.offset + t.size_bytes]
        return flat.reshape(math.prod(t.shape[:-1]), math.prod(t.shape[-1:]) * DTYPE_BITS[t.dtype] // 8)

    def floats(self, name: str) -> np.ndarray:
        """A tensor of floats as float32 in memory of its own; the mapped pages go. Raises what `rows` raises."""
        tensor, rows = self.tensors[name], self.rows(name)
        values = _floats(rows, tensor)
        self.forget(name)
        return values

    def forget(self, name: str) -> None:
        """Let the mapped pages of a tensor go: what was read of it no longer counts as this process's memory."""
        tensor = self.tensors[name]
        forget(self._mapped, tensor.offset, tensor.size_bytes)

    def _fault(self, why: str) -> FileFormatError:
        return FileFormatError(
            what=f"{self.path}: not a usable safetensors file", why=why, fix="train, convert or download it again"
        )

    def _map(self) -> mmap.mmap:
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise self._fault("it cannot be read (it is no regular file)")
            with self.path.open("rb") as f:
                if os.fstat(f.fileno()).st_size < 8:
                    raise self._fault("it is shorter than the header it announces")
                return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as e:
            raise self._fault(f"it cannot be read ({e.strerror})") from e

    def _header_length(self) -> int:
        head = self._bytes[:8].tobytes()
        length = int.from_bytes(head, "little")
        if head == b"version ":
            raise self._fault("it is a Git LFS pointer, not the file itself: `git lfs pull` fetches it")
        if not 2 <= length <= self.size_bytes - 8:
            raise self._fault("it is shorter than the header it announces")
        if length > MAX_HEADER_BYTES:
            raise self._fault(f"a header of {length} bytes (at most {MAX_HEADER_BYTES} are read)")
        return length

    def _parse(self, raw: bytes) -> dict[str, Any]:
        if is_json_bomb(raw):
            raise self._fault("its header holds more values than any real one")
        try:
            header = json.loads(str(raw, "utf-8"), object_pairs_hook=self._object)
        except (ValueError, RecursionError) as e:
            raise self._fault("its header is not JSON") from e
        if not isinstance(header, dict):
            raise self._fault("its header is not a JSON object")
        return header

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise self._fault("a name stands twice in its header")
        return found

    def _texts(self, metadata: Any) -> dict[str, str]:
        try:
            for part in () if metadata is None else (*metadata.keys(), *metadata.values()):
                part.encode()  # an unpaired surrogate is no text
        except (AttributeError, UnicodeEncodeError) as e:
            raise self._fault("its __metadata__ is no table of texts") from e
        return metadata or {}

    def _tensor(self, name: str, entry: Any) -> StoredTensor:
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise self._fault(f"the tensor name {name[:80]!a} is empty, too long or not printable")
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            bits = DTYPE_BITS.get(dtype)
        except (KeyError, TypeError, ValueError) as e:
            raise self._misplaced(name) from e
        if bits is None:
            raise self._fault(f"tensor {name} is of the unknown type {str(dtype)[:80]!a}")
        if (
            not isinstance(shape, list)
            or len(shape) > MAX_DIMS
            or any(type(n) is not int for n in (*shape, start, end))
        ):
            raise self._misplaced(name)
        size_bits, data_bytes = math.prod(shape) * bits, self.size_bytes - self._data_start
        if (
            min(shape, default=0) < 0
            or math.prod(n or 1 for n in shape) > MAX_EXTENT
            or not 0 <= start <= end <= data_bytes
            or (end - start) * 8 != size_bits
        ):
            raise self._misplaced(name)
        return StoredTensor(name, dtype, tuple(shape), self._data_start + start, end - start)

    def _misplaced(self, name: str) -> FileFormatError:
        return self._fault(f"tensor {name} does not lie inside the file as its header says")

    def _check_layout(self) -> None:
        """Every byte behind the header belongs to exactly one tensor."""
        at = self._data_start
        for t in sorted(self.tensors.values(), key=lambda t: (t.offset, t.size_bytes)):
            if t.offset != at:
                raise self._fault(
                    f"tensor {t.name} {'overlaps the one' if t.offset < at else 'leaves a hole'} before it"
                )
            at += t.size_bytes
        if at != self.size_bytes:
            raise self._fault(f"{self.size_bytes - at} bytes at its end belong to no tensor")


def is_json_bomb(raw: bytes) -> bool:
    """Whether a JSON text may take more memory, once read, than any real file's: up to 90 bytes for each of its own."""
    return sum(cost * raw.count(sign) for sign, cost in JSON_COSTS.items()) > MAX_JSON_COST_BYTES


def read_floats(path: Path) -> dict[str, np.ndarray]:
    """Every tensor as float32. Raises FileFormatError for a broken file and for tensors that are not floats."""
    file = SafetensorsFile(path)
    return {name: file.floats(name) for name in file.tensors}


def _floats(rows: np.ndarray, tensor: StoredTensor) -> np.ndarray:
    values = rows.view(FLOATS[tensor.dtype])
    if tensor.dtype == "BF16":  # the upper half of a float32
        wide = values.astype("<u4")
        wide <<= 16
        return wide.view("<f4").reshape(tensor.shape)
    return values.astype(np.float32).reshape(tensor.shape)
