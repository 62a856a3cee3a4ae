"""Importance matrices in llama.cpp's format: for each column of a weight, the sum of squares of what it multiplied.

`llama-quantize --imatrix` takes what is written here, and what llama-imatrix wrote is read here, its older `.dat` too.
Nothing is collected here: `runtime/importance.py` does it in llama.cpp, `edgelora/base/importance.py` in torch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType

from converters.metadata import write_whole
from edgelora.errors import ExportError, FileFormatError, some
from edgelora.files.gguf import MAGIC, MAX_ENTRIES, MAX_NAME_BYTES, GGUFFile

KIND, DATASETS, CHUNKS, CHUNK_TOKENS = "imatrix", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
SUMS, COUNTS = ".in_sum2", ".counts"
LEGACY = (".dat", ".imatrix")  # how files of the format before GGUF end


@dataclass(frozen=True)
class Importance:
    """What went into the products of a model, by GGUF tensor name.

    sums: float32 (n_matrices, columns), of squared activations. counts: int64 (n_matrices,), the tokens that were
    summed. A tensor of stacked experts has a matrix for each, any other one has a single matrix.
    """

    sums: Mapping[str, np.ndarray]
    counts: Mapping[str, np.ndarray]
    chunks: int = 0
    chunk_tokens: int = 0
    datasets: tuple[str, ...] = ()

    def weights(self) -> dict[str, np.ndarray]:
        """The mean squares, float32 (n_matrices * columns,): what `llama_model_quantize` and ggml's kernels take.

        An expert that no token went to counts 1 in each column, as in llama-quantize.
        """
        means = {}
        for name, sums in self.sums.items():
            counts = self.counts[name].astype(np.float32)[:, None]  # (n_matrices, 1)
            means[name] = np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1)).ravel()
        return means

    def unseen(self) -> dict[str, int]:
        """How many experts of a tensor no token went to, where there are any."""
        zeros = {name: int(np.count_nonzero(counts == 0)) for name, counts in self.counts.items()}
        return {name: n for name, n in zeros.items() if n}

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ExportError, naming the faults, unless it belongs to a model with tensors of these shapes.

        shapes: in numpy's order, (rows, columns) or (experts, rows, columns). Tensors without importance are no fault.
        """
        faults = []
        for name, sums in self.sums.items():
            shape = shapes.get(name)
            if shape is None:
                faults.append(f"{name} is no tensor of the model")
            elif sums.size != (wanted := shape[-1] * math.prod(shape[:-2])):
                faults.append(f"{name} has {sums.size} columns, the model's {wanted}")
        if faults:
            raise ExportError(
                what=f"the importance matrix does not fit the model: {some(faults, 5)}",
                why="it was computed on another model",
                fix="compute it on this one: `edgelora imatrix MODEL --data ROWS --out FILE`",
            )


def read_importance(path: Path) -> Importance:
    """Read an importance matrix that anybody wrote.

    Raises FileFormatError for what is none, and for sums or counts that no activations can have, with all faults.
    """
    if path.suffix in LEGACY and path.is_file() and not _begins_as_gguf(path):
        importance = _read_legacy(path)
    else:
        importance = _read_gguf(GGUFFile(path))
    if faults := _faults(importance):
        raise _unusable(path, some(faults, 5))
    return importance


class _Writer(gguf.GGUFWriter):
    def add_architecture(self) -> None:
        """An importance matrix states none."""


def write_importance(path: Path, importance: Importance) -> None:
    """Write to `path` (a staged path) the very bytes that llama-imatrix would."""
    writer = _Writer(path, arch="")
    writer.add_type(KIND)
    writer.add_array(DATASETS, list(importance.datasets) or ["unknown"])  # llama-quantize refuses a file without
    writer.add_uint32(CHUNKS, importance.chunks)
    writer.add_uint32(CHUNK_TOKENS, importance.chunk_tokens)
    for name in sorted(importance.sums):
        sums, counts = importance.sums[name], importance.counts[name].astype(np.float32)[:, None]
        alone = len(sums) == 1  # ggml writes no dimension of 1 at the end
        writer.add_tensor(name + SUMS, np.ascontiguousarray(sums[0] if alone else sums, np.float32))
        writer.add_tensor(name + COUNTS, np.ascontiguousarray(counts[0] if alone else counts))
    write_whole(writer)


def _unusable(path: Path, why: str) -> FileFormatError:
    return FileFormatError(
        what=f"{path}: not a usable importance matrix",
        why=why,
        fix="compute it again: `edgelora imatrix MODEL --data ROWS --out FILE`",
    )


def _faults(importance: Importance) -> list[str]:
    """What cannot be true of sums of squares and numbers of tokens."""
    if not importance.sums:
        return ["it holds no tensors"]
    faults = []
    for name, sums in importance.sums.items():
        counts = importance.counts[name]
        if not np.isfinite(sums).all() or (sums < 0).any():
            faults.append(f"{name} has sums of squares that are negative or not finite")
        elif (counts < 0).any() or not counts.any():
            faults.append(f"{name} was computed on {int(counts.min())} tokens")
        elif len(counts) == len(sums) and sums[counts == 0].any():
            faults.append(f"{name} has sums for an expert that saw no token")
    return faults


def _read_gguf(file: GGUFFile) -> Importance:
    if (kind := file.get("general.type", str, "model")) != KIND:
        raise _unusable(file.path, f"it is a GGUF of the type {kind!r}")
    sums, counts, faults = {}, {}, []
    for stored, info in file.tensors.items():
        if not stored.endswith((SUMS, COUNTS)):
            continue  # llama.cpp reads no other tensors of it either
        name = stored.removesuffix(SUMS).removesuffix(COUNTS)
        other = file.tensors.get(name + (COUNTS if stored.endswith(SUMS) else SUMS))
        if other is None:
            faults.append(f"{stored} stands without its other half")
        elif info.type != GGMLQuantizationType.F32:
            faults.append(f"{stored} is stored as {info.type.name}, expected F32")
        elif stored.endswith(SUMS) and info.elements % other.elements:
            faults.append(f"{name} has {info.elements} sums and {other.elements} counts")
        elif stored.endswith(SUMS):
            sums[name] = file.rows(stored).view(np.float32).reshape(other.elements, -1).copy()
        else:
            values = file.rows(stored).view(np.float32).ravel()
            if not (np.abs(values) < 2**53).all():
                faults.append(f"{stored} holds {values.max()}, no number of tokens")
            else:
                counts[name] = np.rint(values).astype(np.int64)
    if faults:
        raise _unusable(file.path, some(faults, 5))
    datasets = tuple(file.get(DATASETS, list, ()))
    if not all(isinstance(name, str) for name in datasets):
        raise _unusable(file.path, f"{DATASETS} is no list of texts")
    return Importance(sums, counts, file.get(CHUNKS, int, 0), file.get(CHUNK_TOKENS, int, 0), datasets)


# -- the format before GGUF: for each tensor its name, n, and n times the mean squares ------------------------------


def _begins_as_gguf(path: Path) -> bool:
    with path.open("rb") as f:
        return f.read(len(MAGIC)) == MAGIC


def _read_legacy(path: Path) -> Importance:
    data, at = memoryview(path.read_bytes()), 0

    def take(n: int) -> memoryview:
        nonlocal at
        if not 0 <= n <= len(data) - at:
            raise _unusable(path, f"it ends at byte {len(data)}, in the middle of an entry")
        at += n
        return data[at - n : at]

    def number(largest: int) -> int:
        (found,) = struct.unpack("<i", take(4))
        if not 0 <= found <= largest:
            raise _unusable(path, f"a number is {found}, from 0 to {largest} is possible")
        return int(found)

    sums, counts = {}, {}
    for _ in range(number(MAX_ENTRIES)):
        name = bytes(take(number(MAX_NAME_BYTES))).decode("utf-8", "replace")
        counts[name] = np.array([number(2**31 - 1)], np.int64)
        sums[name] = np.frombuffer(take(4 * number(len(data) // 4)), np.float32)[None]
    chunks = number(2**31 - 1) if at < len(data) else 0
    dataset = bytes(take(number(len(data)))).decode("utf-8", "replace") if at < len(data) else ""
    return Importance(sums, counts, chunks, 0, (dataset,) if dataset else ())
