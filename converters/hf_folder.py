"""What a Hugging Face folder is written with: shards whose tensors come a few rows at a time, and JSON. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgelora.files.safetensors import DTYPE_BITS


@dataclass(frozen=True)
class ShardEntry:
    """A tensor of the shard to be: its shape, and its type as the format names it (`BF16`)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def write_shard(
    out: Path,
    entries: Mapping[str, ShardEntry],
    rows_of: Callable[[str], Iterable[np.ndarray]],
    metadata: Mapping[str, str],
) -> Iterator[str]:
    """Write a safetensors file with these tensors in their order; yields the name of each once it is written.

    `rows_of(name)` gives the bytes of a tensor, uint8 (n, bytes per row). Raises what `rows_of` raises.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, entry in entries.items():
        begin, end = end, end + entry.size_bytes
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with out.open("wb") as f:
        f.write(len(raw).to_bytes(8, "little") + raw)
        for name in entries:
            for rows in rows_of(name):
                f.write(np.ascontiguousarray(rows).data)
            yield name


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """As Hugging Face's libraries indent it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
