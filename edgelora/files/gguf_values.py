"""What a GGUF file holds: values under keys, arrays of strings, and where its tensors stand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFValueType

SCALARS = {
    GGUFValueType.UINT8: "<u1", GGUFValueType.INT8: "<i1", GGUFValueType.UINT16: "<u2", GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4", GGUFValueType.INT32: "<i4", GGUFValueType.FLOAT32: "<f4", GGUFValueType.BOOL: "<u1",
    GGUFValueType.UINT64: "<u8", GGUFValueType.INT64: "<i8", GGUFValueType.FLOAT64: "<f8",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file. `shape` is in numpy's order (rows first); `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    size_bytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class Strings(Sequence[str]):
    """An array of strings inside a file: one buffer with offsets, decoded one by one and only on demand, so that a
    vocabulary is not 100,000 objects."""

    def __init__(self, buffer: memoryview, starts: np.ndarray, ends: np.ndarray) -> None:
        self._buffer, self._starts, self._ends = buffer, starts, ends

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return self.raw(i).decode("utf-8", "replace")

    def raw(self, i: int) -> bytes:
        """The bytes of one string as they stand in the file."""
        return bytes(self._buffer[self._starts[i] : self._ends[i]])

    def __iter__(self) -> Iterator[str]:
        for i in range(0, len(self), 4096):  # Python's integers for some of the offsets at a time
            for start, end in zip(self._starts[i : i + 4096].tolist(), self._ends[i : i + 4096].tolist(), strict=True):
                yield str(self._buffer[start:end], "utf-8", "replace")


@dataclass(frozen=True, slots=True)
class Value:
    """A metadata value with the type it was stored with, and for arrays that of its elements.

    `end` is the file's byte behind it: `fill_reserved` writes in front of that.
    """

    type: GGUFValueType
    data: Any
    item: GGUFValueType | None = None
    end: int = 0
