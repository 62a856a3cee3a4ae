"""How many bytes a GGUF will take, from what will be in it: exact, before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUFValueType

from edgelora.files.gguf import SCALARS, Strings, Value

FIXED_BYTES = 24  # magic, version, and how many tensors and keys there are
# llama.cpp writes these anew in every file it quantizes, and drops how the source was split.
REWRITTEN = ("general.quantization_version", "general.file_type")
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


def padded(n_bytes: int, alignment: int = GGUF_DEFAULT_ALIGNMENT) -> int:
    """Bytes up to the next multiple of `alignment`."""
    return -(-n_bytes // alignment) * alignment


def header_bytes(
    metadata: Mapping[str, Value], shapes: Mapping[str, tuple[int, ...]], added: Mapping[str, str | float]
) -> int:
    """The header of a quantized file, padded: `metadata` of its source, `shapes` by tensor name, and keys `added`."""
    own = dict.fromkeys(REWRITTEN, 4) | {key: _plain_bytes(value) for key, value in added.items()}
    kept = {key: value_bytes(v) for key, v in metadata.items() if key not in own and key not in SPLIT_KEYS}
    keys = sum(8 + len(key.encode()) + 4 + n_bytes for key, n_bytes in (own | kept).items())
    infos = sum(8 + len(name.encode()) + 4 + 8 * len(shape) + 4 + 8 for name, shape in shapes.items())
    return padded(FIXED_BYTES + keys + infos)


def data_bytes(sizes: Iterable[int]) -> int:
    """The tensors' part of a file: each padded."""
    return sum(padded(size) for size in sizes)


def value_bytes(value: Value) -> int:
    """A metadata value as it stands in a file, without its key and type."""
    if value.type == GGUFValueType.STRING:
        return 8 + len(value.data.encode())
    if value.type != GGUFValueType.ARRAY:
        return np.dtype(SCALARS[value.type]).itemsize
    if isinstance(value.data, Strings):
        return 12 + sum(8 + len(value.data.raw(i)) for i in range(len(value.data)))
    return 12 + int(value.data.nbytes)


def _plain_bytes(value: str | float) -> int:
    if isinstance(value, str):
        return 8 + len(value.encode())
    return 1 if isinstance(value, bool) else 4
