"""Examples end to end in two flat arrays: in memory while they are few, else in files of a folder it is given.

8 bytes a token. The files have no names, so that nothing is left of them whatever ends the process; what is read of
them lies in memory only as long as the system has room.
"""

from __future__ import annotations

import hashlib
import mmap
from array import array
from pathlib import Path
from tempfile import SpooledTemporaryFile
from types import TracebackType
from typing import IO

import numpy as np

from edgelora.data.encode import Example
from edgelora.errors import OutputError

IN_MEMORY_BYTES = 128 << 20  # of each of the two arrays


class Store:
    """Append examples in a `with` block, and read them behind it. `sha256`: of all that was appended, in its order.

    folder: where arrays of more than `in_memory_bytes` go; None keeps them in memory. Raises OutputError if the disk
    refuses.
    """

    def __init__(self, folder: Path | None = None, in_memory_bytes: int = IN_MEMORY_BYTES) -> None:
        self._folder, self._limit = folder, in_memory_bytes if folder is not None else 0
        self._files = tuple(self._file() for _ in range(2))
        self._arrays: tuple[np.ndarray, np.ndarray] | None = None
        self._starts = array("q", [0])
        self._sha256 = hashlib.sha256()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None:
                ids, weights = (self._read(file) for file in self._files)
                self._arrays = np.frombuffer(ids, "<u4"), np.frombuffer(weights, "<f4")
        finally:
            for file in self._files:
                file.close()  # what is mapped stays until the last array is gone

    def append(self, example: Example) -> None:
        ids = example.input_ids.astype("<u4").tobytes()
        weights = (example.loss_mask if example.weights is None else example.weights).astype("<f4").tobytes()
        self._sha256.update(len(example).to_bytes(8, "little") + ids + weights)
        try:
            for file, raw in zip(self._files, (ids, weights), strict=True):
                file.write(raw)
        except OSError as e:
            raise _refused(self._folder, e) from e
        self._starts.append(self._starts[-1] + len(example))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> Example:
        assert self._arrays is not None, "examples are read behind the `with` block"
        ids, weights = (part[self._starts[number] : self._starts[number + 1]] for part in self._arrays)
        learned = weights > 0
        return Example(ids.astype(np.int64), learned, weights=None if (weights == learned).all() else weights.copy())

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example (n,)."""
        return np.diff(np.frombuffer(self._starts, np.int64))

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    @property
    def on_disk(self) -> bool:
        """Whether an array (4 bytes a token) has outgrown `in_memory_bytes`."""
        return bool(self._limit) and 4 * self._starts[-1] > self._limit

    def _file(self) -> IO[bytes]:
        try:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            return SpooledTemporaryFile(self._limit, dir=None if self._folder is None else str(self._folder))
        except OSError as e:
            raise _refused(self._folder, e) from e

    def _read(self, file: IO[bytes]) -> bytes | mmap.mmap:
        try:
            file.flush()
            if self.on_disk:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            file.seek(0)
            return file.read()
        except OSError as e:
            raise _refused(self._folder, e) from e


def _refused(folder: Path | None, e: OSError) -> OutputError:
    return OutputError(
        what=f"{folder}: the encoded rows could not be written here ({e.strerror})",
        why="data that is larger than memory is kept in this folder while it is trained on, 8 bytes a token",
        fix="free some space, or choose a folder on another disk",
    )
