"""A base → one GGUF in F32, F16 or BF16, streamed tensor by tensor: what llama.cpp needs to run a checkpoint.

Names, order of rows, shifted norms and metadata come from the rows of `architectures/`; the vocabulary from `data/`.
What llama.cpp would load and run wrongly is refused with the reason. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType, LlamaFileType

from converters.in_range import in_range
from converters.metadata import write_metadata
from converters.stream import Entry, write_streamed
from edgelora.architectures.metadata import context_in_llama_cpp, gguf_extra_tensors, unlike_llama_cpp
from edgelora.architectures.names import gguf_place, gguf_row_order, is_norm, tensor_shapes
from edgelora.base import ggml
from edgelora.base.model import Base
from edgelora.errors import ConfigError, ExportError
from edgelora.files.gguf import GGUFFile
from edgelora.progress import OnProgress, silent

Type = GGMLQuantizationType

ELSE = "convert to BF16 or F32; if it is not a number, download the checkpoint again"
ELEMENTS_AT_ONCE = 1 << 20  # floats alive while a tensor goes from one type to another

FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32, "F16": LlamaFileType.MOSTLY_F16, "BF16": LlamaFileType.MOSTLY_BF16,
}  # fmt: skip


@dataclass(frozen=True)
class Target(Entry):
    """A tensor of the file to be, and the HF tensors that become it: several are stacked experts, none is a table."""

    sources: list[str] = field(default_factory=list)


class Slab(NamedTuple):
    """Some rows of a tensor: float32 (n, columns), the first of them row `first` of the matrix number `matrix`."""

    matrix: int
    first: int
    floats: np.ndarray


def refuse_unlike(base: Base) -> None:
    """Raise ExportError if llama.cpp would load this base and compute something else."""
    faults = unlike_llama_cpp(base.architecture, base.config)
    if faults:
        raise ExportError(
            what=f"{base.path}: llama.cpp would compute otherwise {'; '.join(faults)}",
            why="a file that loads and answers wrongly is worse than none",
            fix="train and score it in torch, or use another base for llama.cpp",
        )


def shortened_context(base: Base) -> tuple[int, int] | None:
    """(context written, context of the model) where llama.cpp computes something else beyond it."""
    written, full = context_in_llama_cpp(base.architecture, base.config), base.config.max_position_embeddings
    return (written, full) if written < full else None


def write_base_gguf(out: Path, base: Base, dtype: str = "F16", on_progress: OnProgress = silent) -> None:
    """Write `base` to `out` (a staged path). Norms, biases and routers stay F32.

    Raises ConfigError for an unknown `dtype`; ExportError, naming the tensor, if a weight does not fit into it, and for
    what llama.cpp would compute otherwise; BaseModelError for a tokenizer that is not known.
    """
    if dtype not in FILE_TYPES:
        raise ConfigError(
            what=f"{dtype}: a base is not written as this",
            why="a converted base keeps its weights as floats; smaller files are made from it",
            fix=f"choose one of {', '.join(FILE_TYPES)}, then `edgelora quantize`",
        )
    refuse_unlike(base)
    writer = gguf.GGUFWriter(out, base.architecture.gguf_name)
    write_metadata(writer, base, FILE_TYPES[dtype])
    targets = plan(base, GGMLQuantizationType[dtype])

    def rows_of(name: str) -> Iterator[np.ndarray]:
        for slab in slabs(base, name, targets[name]):
            yield in_range(f"{name}: a weight", slab.floats, targets[name].kind, fix=ELSE)

    write_streamed(writer, targets, rows_of, "convert", on_progress)


def plan(base: Base, kind: Type) -> dict[str, Target]:
    """Every tensor of the file by its GGUF name, matrices as `kind`."""
    architecture, config = base.architecture, base.config
    router = architecture.experts.router if architecture.experts else None
    tables = gguf_extra_tensors(config)
    targets = {name: Target(values.shape, Type.F32) for name, values in tables.items()}
    for name, shape in tensor_shapes(architecture, config, base.biased).items():
        place = gguf_place(architecture, config, name)
        floats = len(shape) == 1 or is_norm(name) or (router is not None and name.endswith(f".{router}.weight"))
        if place.expert is None:
            targets[place.name] = Target(shape, Type.F32 if floats else kind, [name])
        else:
            stacked = targets.setdefault(place.name, Target((config.num_experts, *shape), kind))
            stacked.sources.append(name)
    return targets


def slabs(base: Base, name: str, target: Target) -> Iterator[Slab]:
    """The rows of a tensor of the file in its order, a few at a time; then the pages of the base that held it go."""
    return _gguf_slabs(base.file, name) if base.is_gguf else _checkpoint_slabs(base, name, target)


def _gguf_slabs(file: GGUFFile, name: str) -> Iterator[Slab]:
    info, rows = file.tensors[name], file.rows(name)
    height = info.shape[-2] if len(info.shape) > 1 else 1
    for matrix in range(len(rows) // height):
        for part in _parts(height, info.shape[-1]):
            here = rows[matrix * height + part.start : matrix * height + part.stop]
            yield Slab(matrix, part.start, ggml.dequantize(here, info.type, info.shape[-1]))
    file.forget(name)


def _checkpoint_slabs(base: Base, name: str, target: Target) -> Iterator[Slab]:
    if not target.sources:
        yield Slab(0, 0, gguf_extra_tensors(base.config)[name].reshape(1, -1))
    for matrix, source in enumerate(target.sources):
        order = gguf_row_order(base.architecture, base.config, source.rpartition(".")[0])
        if len(target.shape) == 1:  # a norm or a bias
            values = base.tensors.vector(source)
            yield Slab(0, 0, (values if order is None else values[order]).reshape(1, -1))
        else:
            stored = base.tensors.matrix(source)
            for part in _parts(len(stored.rows), stored.columns):
                rows = stored.rows[part if order is None else order[part]]
                yield Slab(matrix, part.start, ggml.dequantize(rows, stored.kind, stored.columns))
        base.source.forget(source)


def _parts(n_rows: int, columns: int) -> Iterator[slice]:
    step = max(1, ELEMENTS_AT_ONCE // columns)
    return (slice(first, min(first + step, n_rows)) for first in range(0, n_rows, step))
