"""Write a GGUF whose tensors come a few rows at a time: none is ever whole in memory. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import BinaryIO

import gguf
import numpy as np
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType

from edgelora.base import ggml
from edgelora.progress import OnProgress, Pace, Progress, silent

Type = GGMLQuantizationType


@dataclass(frozen=True)
class Entry:
    """A tensor of the file to be: its shape in numpy's order, and its type."""

    shape: tuple[int, ...]
    kind: Type

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * ggml.row_bytes(self.kind, self.shape[-1])


def write_header(writer: gguf.GGUFWriter, entries: Mapping[str, Entry]) -> None:
    """Write all of a GGUF but the tensors' data: the metadata that `writer` holds, and what `entries` say."""
    for name, entry in entries.items():
        writer.add_tensor_info(name, entry.shape, np.dtype(np.float32), entry.size_bytes, entry.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def write_streamed(
    writer: gguf.GGUFWriter,
    entries: Mapping[str, Entry],
    rows_of: Callable[[str], Iterable[np.ndarray]],
    stage: str,
    on_progress: OnProgress = silent,
) -> None:
    """Write a whole GGUF. `rows_of(name)` gives the rows of a tensor in order, uint8 (n, bytes per row).

    `stage` names the work in Progress. Raises what `rows_of` raises.
    """
    write_header(writer, entries)
    pace = Pace(sum(entry.size_bytes for entry in entries.values()))
    assert writer.path is not None
    with writer.path.open("ab") as f:
        for done, (name, entry) in enumerate(entries.items(), 1):
            _pad(f)
            begin = f.tell()
            for rows in rows_of(name):
                f.write(np.ascontiguousarray(rows).data)
            if f.tell() - begin != entry.size_bytes:
                raise ValueError(f"{name}: {f.tell() - begin} bytes instead of {entry.size_bytes}")
            _, eta = pace.step(0, entry.size_bytes)
            on_progress(Progress(stage, done, len(entries), eta_s=eta))
        _pad(f)


def _pad(f: BinaryIO) -> None:
    f.write(bytes(-f.tell() % GGUF_DEFAULT_ALIGNMENT))
