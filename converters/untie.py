"""A base whose head is its embedding → the same model with a head of its own, the same bytes. Imports no torch.

Over it a LoRA of the embedding or of the head is one tensor's; of a tied base's it would stop llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np

from converters.base_to_gguf import refuse_unlike
from converters.merge import Recipe, describe
from converters.quant_types import HEAD
from converters.stream import Entry, write_streamed
from converters.token_pairs import EMBEDDING
from edgelora.base.model import Base
from edgelora.errors import ExportError
from edgelora.progress import OnProgress, silent


def require_tied(base: Base) -> None:
    """Raise ExportError for a base that has a head of its own, or a family of which llama.cpp reads none;
    BaseModelError for a checkpoint."""
    if HEAD in base.file.tensors:
        raise ExportError(
            what=f"{base.path}: it has a head of its own already",
            why="only a model whose head is its embedding can be untied",
            fix="use it as it is",
        )
    refuse_unlike(replace(base, config=replace(base.config, tie_word_embeddings=False)))


def write_untied(out: Path, base: Base, on_progress: OnProgress = silent) -> None:
    """Write `base`, a GGUF with a tied head, to `out` (a staged path), its embedding once more as the head.

    Everything else is copied as it stands; the fingerprint, and so what its adapters are held to, is the same.
    """
    require_tied(base)
    writer = gguf.GGUFWriter(out, base.architecture.gguf_name)
    describe(writer, Recipe(base, [], {}, base.file.get("general.file_type", int)))
    entries = {name: Entry(info.shape, info.type) for name, info in base.file.tensors.items()}
    entries[HEAD] = entries[EMBEDDING]

    def rows_of(name: str) -> Iterator[np.ndarray]:
        source = EMBEDDING if name == HEAD else name
        yield base.file.rows(source)
        base.file.forget(source)

    write_streamed(writer, entries, rows_of, "untie", on_progress)
