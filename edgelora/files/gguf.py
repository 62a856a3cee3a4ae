"""Read a GGUF file without trusting it: every count, size and offset is checked against the file's length.

gguf-py reads what we wrote; this reads what strangers wrote, before gguf-py or llama.cpp see it. Tensor data stays
memory-mapped. What costs an object or a step of Python each (keys, tensors, strings, texts) has a limit far above any
real model's.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
import struct
from array import array
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from edgelora.errors import FileFormatError
from edgelora.files.checkpoint import PICKLE_STARTS, PICKLES, pickle_fault
from edgelora.files.gguf_values import SCALARS, Strings, TensorInfo, Value
from edgelora.files.mapped import forget

__all__ = [
    "MAGIC", "MAX_ENTRIES", "MAX_NAME_BYTES", "MAX_STRINGS", "MAX_TEXT_BYTES", "NEVER_IN_FILES", "SCALARS", "GGUFFile",
    "Strings", "TensorInfo", "Value",
]  # fmt: skip

MAGIC, LFS_POINTER = b"GGUF", b"version "
HEADER_BYTES = 24
MAX_NAME_BYTES = 63  # ggml keeps names in 64 bytes, the last one is zero
MAX_KEY_BYTES = 65_535
MAX_DIMS = 4
MAX_ENTRIES = 65_536  # keys, and tensors; DeepSeek-V3 has 1,025 tensors
MAX_STRINGS = 1 << 21  # over all arrays; Gemma 3 has 262,144 tokens and 514,906 merges
MAX_TEXT_BYTES = 48 << 20  # over all names and single texts: Python keeps up to four bytes for each of these

# Keys that llama.cpp takes in one type only; it aborts on some others.
FIXED_TYPES = {
    "general.architecture": GGUFValueType.STRING, "general.type": GGUFValueType.STRING,
    "general.alignment": GGUFValueType.UINT32,
}  # fmt: skip
# Types that ggml makes of activations while it computes.
NEVER_IN_FILES = (GGMLQuantizationType.Q8_1, GGMLQuantizationType.Q8_K)


class GGUFFile:
    """An open, checked GGUF file: `metadata` by key, `tensors` by name, `rows(name)` for the mapped blocks.

    `files` are the files it reads: itself (`files/split.py` has models in several). `content`: all its bytes, if they
    are in memory already; then nothing is read, and `path` is only its name.
    Raises FileFormatError for anything that is not a whole, well-formed GGUF v2/v3 file.
    """

    def __init__(self, path: Path | str, content: bytes | None = None) -> None:
        self.path = Path(path)
        self.files: tuple[Path, ...] = (self.path,)
        self._map: mmap.mmap | None = None
        if content is None:
            self._map = self._mapped()
            self._buffer = memoryview(self._map)
        else:
            self._refuse_others(content[: len(LFS_POINTER)])
            self._buffer = memoryview(content)
        self.size_bytes = len(self._buffer)
        if self.size_bytes < HEADER_BYTES:
            raise self._fault("the file is shorter than a GGUF header")
        self._at = self._text_bytes = self._n_strings = 0
        self.metadata: dict[str, Value] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._read_header()

    def _mapped(self) -> mmap.mmap:
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise self._fault("this is a folder or a device, not a file", "pass a file")
            with self.path.open("rb") as f:
                self._refuse_others(f.read(len(LFS_POINTER)))
                if os.fstat(f.fileno()).st_size < HEADER_BYTES:  # an empty file cannot be mapped
                    raise self._fault("the file is shorter than a GGUF header")
                return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as e:
            raise FileFormatError(
                what=f"{self.path}: no such file", why="the path does not exist", fix="check the spelling of the path"
            ) from e
        except OSError as e:
            raise self._fault(f"cannot be read ({e.strerror})") from e

    # -- what others ask ------------------------------------------------------------------------------------------

    def get(self, key: str, expected: type, default: Any = None) -> Any:
        """The value of `key` if it has the Python type `expected` (int, float, bool, str, list); else a typed error.

        A missing key gives `default`. Arrays come as numpy arrays or `Strings`. A number asked for as float is finite.
        """
        value = self.metadata.get(key)
        if value is None:
            return default
        data = value.data
        right = {
            int: isinstance(data, int) and not isinstance(data, bool),
            float: isinstance(data, int | float) and not isinstance(data, bool) and math.isfinite(data),
            bool: isinstance(data, bool),
            str: isinstance(data, str),
            list: isinstance(data, np.ndarray | Strings),
        }[expected]
        if not right:
            infinite = isinstance(data, float) and not math.isfinite(data)
            shown = data if infinite else f"a {value.type.name}"
            raise self._fault(f"metadata {key} is {shown}, expected {expected.__name__}")
        return data

    def rows(self, name: str) -> np.ndarray:
        """The blocks of a tensor as uint8 (n_rows, bytes per row), mapped, not copied."""
        info = self.tensors[name]
        flat = np.frombuffer(self._buffer, np.uint8, info.size_bytes, info.offset)
        return flat.reshape(info.elements // info.shape[-1], -1)

    def forget(self, name: str) -> None:
        """Let the mapped pages of a tensor go: what was read of it no longer counts as this process's memory."""
        info = self.tensors[name]
        if self._map is not None:
            forget(self._map, info.offset, info.size_bytes)

    @cached_property
    def architecture(self) -> str:
        """llama.cpp's name of the family; empty where none is stated."""
        return str(self.get("general.architecture", str, ""))

    # -- reading --------------------------------------------------------------------------------------------------

    def _fault(self, why: str, fix: str = "download or export the file again") -> FileFormatError:
        return FileFormatError(what=f"{self.path}: not a usable GGUF file", why=why, fix=fix)

    def _refuse_others(self, start: bytes) -> None:
        """Say of a well-known kind of file what it is."""
        if start.startswith(MAGIC):
            return
        if start == LFS_POINTER:
            raise self._fault("it is a Git LFS pointer, not the file itself", "fetch it with `git lfs pull`")
        if start.startswith(PICKLE_STARTS) or self.path.suffix in PICKLES:
            raise pickle_fault(self.path)
        if self.path.suffix in (".safetensors", ".json"):
            raise self._fault("it is one file of a Hugging Face folder", f"pass its folder: {self.path.parent}")

    def _take(self, n: int) -> memoryview:
        if n > self.size_bytes - self._at:
            raise self._fault(f"it ends at byte {self.size_bytes}, in the middle of its header")
        self._at += n
        return self._buffer[self._at - n : self._at]

    def _number(self, fmt: str) -> int:
        return int(struct.unpack(fmt, self._take(struct.calcsize(fmt)))[0])

    def _name(self, limit: int) -> str:
        name = self._text("name", limit)
        if not name or not name.isprintable():
            raise self._fault(f"the name {name[:80]!a} is empty or cannot be printed")
        return name

    def _text(self, what: str, limit: int) -> str:
        n = self._number("<Q")
        if n > limit:
            raise self._fault(f"a {what} of {n} bytes (at most {limit} are allowed)")
        self._text_bytes += n
        if self._text_bytes > MAX_TEXT_BYTES:
            raise self._fault(f"names and texts of more than {MAX_TEXT_BYTES} bytes together")
        try:
            return str(self._take(n), "utf-8")
        except UnicodeDecodeError as e:
            raise self._fault(f"a {what} that is not UTF-8") from e

    def _read_header(self) -> None:
        if bytes(self._take(4)) != MAGIC:
            raise self._fault("it does not begin with the letters GGUF")
        version = self._number("<I")
        if version not in (2, 3):
            raise self._fault(f"GGUF version {version} (2 and 3 are known; big-endian files are not)")
        n_tensors, n_keys = self._number("<Q"), self._number("<Q")
        # the smallest entry: key 8 + type 4 + value 1; name 8 + dims 4 + one dimension 8 + type 4 + offset 8
        if max(n_keys, n_tensors) > MAX_ENTRIES or n_keys * 13 + n_tensors * 32 > self.size_bytes:
            raise self._fault(f"it claims {n_keys} keys and {n_tensors} tensors, more than it can hold")
        for _ in range(n_keys):
            key = self._name(MAX_KEY_BYTES)
            if key in self.metadata:
                raise self._fault(f"the key {key} stands in it twice")
            value = self._value(self._value_type())
            if value.type != FIXED_TYPES.get(key, value.type):
                raise self._fault(f"{key} is a {value.type.name}, expected {FIXED_TYPES[key].name}")
            self.metadata[key] = value
        self._read_tensors(n_tensors)

    def _value_type(self) -> GGUFValueType:
        raw = self._number("<I")
        try:
            return GGUFValueType(raw)
        except ValueError as e:
            raise self._fault(f"a value of unknown type {raw}") from e

    def _value(self, kind: GGUFValueType) -> Value:
        if kind == GGUFValueType.STRING:
            text = self._text("text", MAX_TEXT_BYTES)
            return Value(kind, text, end=self._at)
        if kind == GGUFValueType.ARRAY:
            return self._array()
        code = np.dtype(SCALARS[kind])
        data = np.frombuffer(self._take(code.itemsize), code)[0].item()
        return Value(kind, bool(data) if kind == GGUFValueType.BOOL else data, end=self._at)

    def _array(self) -> Value:
        item, n = self._value_type(), self._number("<Q")
        if item == GGUFValueType.ARRAY:
            raise self._fault("an array of arrays, which llama.cpp does not read")
        if item != GGUFValueType.STRING:
            code = np.dtype(SCALARS[item])
            if n > (self.size_bytes - self._at) // code.itemsize:
                raise self._fault(f"an array of {n} elements, more than the file can hold")
            return Value(GGUFValueType.ARRAY, np.frombuffer(self._take(n * code.itemsize), code), item)
        starts, ends = self._read_strings(n)
        return Value(GGUFValueType.ARRAY, Strings(self._buffer, starts, ends), item)

    def _read_strings(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Where each of the next `n` strings begins and ends, counted from the file's start."""
        self._n_strings += n
        if n > (self.size_bytes - self._at) // 8 or self._n_strings > MAX_STRINGS:
            raise self._fault(f"an array of {n} strings, more than it can hold")
        read, at, buffer = struct.Struct("<Q").unpack_from, self._at, self._buffer
        marks = array("q", (at,))
        try:
            for _ in range(n):
                at += 8 + read(buffer, at)[0]
                marks.append(at)
        except (struct.error, OverflowError):  # read from beyond the end, or marked what no file can hold
            at = self.size_bytes + 1
        if at > self.size_bytes:
            raise self._fault("a string that runs past the end of the file")
        self._at = at
        edges = np.frombuffer(marks, np.int64)
        return edges[:-1] + 8, edges[1:]

    def _read_tensors(self, n_tensors: int) -> None:
        alignment = self.get("general.alignment", int, 32)
        if not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise self._fault(f"general.alignment is {alignment}, not a power of two from 8 to 65536")
        found: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]] = []
        for _ in range(n_tensors):
            name = self._name(MAX_NAME_BYTES)
            n_dims = self._number("<I")
            if not 1 <= n_dims <= MAX_DIMS:
                raise self._fault(f"tensor {name} has {n_dims} dimensions (1 to {MAX_DIMS} are allowed)")
            shape = tuple(self._number("<Q") for _ in range(n_dims))[::-1]
            raw = self._number("<I")
            if raw not in GGMLQuantizationType._value2member_map_:
                raise self._fault(f"tensor {name} has the unknown type {raw}")
            if (kind := GGMLQuantizationType(raw)) in NEVER_IN_FILES:
                raise self._fault(
                    f"tensor {name} is {kind.name}, which llama.cpp makes in memory only, never in a file"
                )
            found.append((name, shape, kind, self._number("<Q")))
        data_start = -(-self._at // alignment) * alignment
        expected = 0
        for name, shape, kind, offset in found:
            if name in self.tensors:
                raise self._fault(f"the tensor {name} stands in it twice")
            size = self._tensor_bytes(name, shape, kind)
            if offset != expected:
                raise self._fault(f"tensor {name} begins at {offset}, expected {expected}: overlapping or out of order")
            if data_start + offset + size > self.size_bytes:
                raise self._fault(f"tensor {name} ends past the end of the file: it was cut short")
            self.tensors[name] = TensorInfo(name, shape, kind, data_start + offset, size)
            expected = -(-(offset + size) // alignment) * alignment

    def _tensor_bytes(self, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
        elements = 1
        for n in shape:
            elements *= n
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if min(shape) < 1 or elements > self.size_bytes * 64:
            raise self._fault(f"tensor {name} has the impossible shape {shape}")
        if shape[-1] % block:
            raise self._fault(f"tensor {name}: rows of {shape[-1]} do not divide into {kind.name} blocks of {block}")
        return elements // block * block_bytes
