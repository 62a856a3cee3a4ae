"""A base GGUF → the same with rows for more tokens, in the tensors' own block types. Imports no torch.

A new row of the embedding, and of the head where that is another matrix, is the mean of those that its text had before,
quantized by ggml: where fast vocabulary transfer begins (Gee et al., arXiv:2402.09977). A row of padding is the mean of
all, whose logit is the mean of all logits and never the largest. All other rows and tensors are copied as they stand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import Keys

from converters.merge import Recipe, describe
from converters.metadata import put
from converters.quant_types import HEAD, requires_importance
from converters.stream import Entry, write_streamed
from converters.token_pairs import EMBEDDING
from edgelora.base import ggml
from edgelora.base.model import Base
from edgelora.base.tensors import Stored
from edgelora.data.new_tokens import SCORE, Grown
from edgelora.files.gguf import GGUFFile, Strings
from edgelora.progress import OnProgress, silent


def mean_rows(stored: Stored, grown: Grown) -> np.ndarray:
    """The rows of the new tokens, and of padding behind them, as the matrix `stored` (V, d) is: uint8 (k, bytes a row).

    Raises ExportError for a type that ggml cannot write.
    """
    means = [
        ggml.dequantize(np.ascontiguousarray(stored.rows[list(ids)]), stored.kind, stored.columns).mean(0)
        for ids in grown.pieces
    ]
    if grown.padding:
        means += [_mean_of_all(stored)] * grown.padding
    # some types ask what each column is worth: the same, as far as is known here
    importance = np.ones(stored.columns, np.float32) if requires_importance("", stored.kind) else None
    return ggml.quantize(np.stack(means), stored.kind, importance)


def _mean_of_all(stored: Stored) -> np.ndarray:
    """float32 (d,)"""
    total, step = np.zeros(stored.columns, np.float64), max(1, ggml.ELEMENTS_AT_ONCE // stored.columns)
    for first in range(0, len(stored.rows), step):
        total += ggml.dequantize(stored.rows[first : first + step], stored.kind, stored.columns).sum(0, np.float64)
    return (total / len(stored.rows)).astype(np.float32)


def spliced(rows: np.ndarray, new: np.ndarray, first: int) -> Iterator[np.ndarray]:
    """The rows of the larger matrix in order: `new` are its rows from `first` on, where padding was or beyond."""
    yield rows[:first]
    yield new
    yield rows[first + len(new) :]


def write_with_tokens(out: Path, base: Base, grown: Grown, on_progress: OnProgress = silent) -> None:
    """Write `base`, a GGUF, to `out` (a staged path) with the tokens of `grown`. Raises what `mean_rows` raises."""
    file = base.file
    writer = gguf.GGUFWriter(out, base.architecture.gguf_name)
    describe(writer, Recipe(base, [], {}, file.get("general.file_type", int)))
    writer.kv_data[0].pop(Keys.Tokenizer.HF_JSON, None)  # it would tell of the smaller vocabulary
    put(writer, _vocabulary_keys(file, grown))
    entries = {name: Entry(info.shape, info.type) for name, info in file.tensors.items()}
    larger = [name for name in (EMBEDDING, HEAD) if name in entries]
    for name in larger:
        entries[name] = replace(entries[name], shape=(grown.n_tokens, entries[name].shape[-1]))

    def rows_of(name: str) -> Iterator[np.ndarray]:
        rows, info = file.rows(name), file.tensors[name]
        if name in larger:
            yield from spliced(rows, mean_rows(Stored(rows, info.type, info.shape[-1]), grown), grown.first)
        else:
            yield rows
        file.forget(name)

    write_streamed(writer, entries, rows_of, "add-tokens", on_progress)


def _vocabulary_keys(file: GGUFFile, grown: Grown) -> dict[str, Any]:
    """The lists of the vocabulary with the new tokens, what was there byte for byte."""
    keys, new, own = Keys.Tokenizer, grown.written, grown.vocabulary
    texts = file.get(keys.LIST, list)
    assert isinstance(texts, Strings)
    raw = [texts.raw(i) for i in range(len(texts))]
    kinds = file.get(keys.TOKEN_TYPE, list).tolist()
    raw[new], kinds[new] = [text.encode() for text in own.tokens[new]], map(int, own.types[new])
    found: dict[str, Any] = {keys.LIST: raw, keys.TOKEN_TYPE: kinds}
    if keys.SCORES in file.metadata:
        scores = file.get(keys.SCORES, list).astype(np.float32).tolist()
        scores[new] = own.scores[new] or [SCORE] * len(own.tokens[new])  # byte-level BPE has no use for them
        found[keys.SCORES] = scores
    size = f"{file.architecture}.vocab_size"
    return found | ({size: grown.n_tokens} if size in file.metadata else {})
