"""A checkpoint → the same with rows for more tokens: its shards, config.json and tokenizer files. Imports no torch.

All tensors but the embedding and the head are copied byte for byte; of those files that describe a tokenizer only what
names tokens changes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from tokenizers import Tokenizer

from converters.add_tokens import mean_rows, spliced
from converters.hf_folder import ShardEntry, write_json, write_shard
from converters.merge_to_hf import BESIDE
from edgelora.architectures.names import EMBEDDING, HEAD
from edgelora.base.model import Base
from edgelora.base.tensors import Stored
from edgelora.data.hf_files import LARGEST_FILE, HFFolder
from edgelora.data.new_tokens import Grown
from edgelora.errors import ExportError
from edgelora.files.checkpoint import CONFIG, INDEX, Checkpoint, read_json
from edgelora.files.safetensors import SafetensorsFile, StoredTensor
from edgelora.progress import OnProgress, Pace, Progress, silent

TOKENIZER, TOKENIZER_CONFIG, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
LARGER = (f"{EMBEDDING}.weight", f"{HEAD}.weight")  # a tied model's file may hold the second all the same


@dataclass(frozen=True)
class Added:
    """The new tokens as a tokenizer of Hugging Face's knows them."""

    ids: Mapping[str, int]
    control: bool
    rstrip: bool
    """Drops the white space behind it, as the other special tokens of this vocabulary do."""

    def decoder(self) -> dict[str, dict[str, Any]]:
        """As tokenizer_config.json has them."""
        flags = {
            "lstrip": False, "normalized": False, "rstrip": self.rstrip, "single_word": False, "special": self.control,
        }  # fmt: skip
        return {str(token): {"content": text, **flags} for text, token in self.ids.items()}

    def listed(self) -> list[dict[str, Any]]:
        """As tokenizer.json has them."""
        return [{"id": int(token), **settings} for token, settings in self.decoder().items()]


def write_folder_with_tokens(
    out: Path, base: Base, grown: Grown, *, control: bool, on_progress: OnProgress = silent
) -> None:
    """Fill the folder `out` (a staged path) with `base`, a checkpoint, and the tokens of `grown`.

    Raises ExportError where the `tokenizers` library would read the tokens as others.
    """
    source = base.source
    assert isinstance(source, Checkpoint)
    pace = Pace(len(source.tensors))
    for shard in source.shards:
        for _ in _write_shard(out / shard.path.name, shard, grown):
            _, eta = pace.step(0)
            on_progress(Progress("add-tokens", pace.done, pace.total, eta_s=eta))
    for name in BESIDE:
        if (file := base.path / name).is_file():
            shutil.copyfile(file, out / name)
    write_json(out / CONFIG, {**source.config, "vocab_size": grown.n_tokens})
    if len(source.shards) > 1:
        index = read_json(base.path / INDEX)
        metadata = index.get("metadata")
        shards = [SafetensorsFile(out / shard.path.name) for shard in source.shards]
        total = sum(tensor.size_bytes for shard in shards for tensor in shard.tensors.values())
        index["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": total}
        write_json(out / INDEX, index)
    ids = dict(zip(grown.texts, grown.ids, strict=True))
    _name_tokens(out, HFFolder(base.path), Added(ids, control, base.vocabulary.strip_after_special))


def _write_shard(out: Path, shard: SafetensorsFile, grown: Grown) -> Iterator[str]:
    """Write one file; yields the name of each of its tensors once it is written."""
    entries = {
        t.name: ShardEntry((grown.n_tokens, *t.shape[1:]) if t.name in LARGER else t.shape, t.dtype)
        for t in sorted(shard.tensors.values(), key=lambda t: t.offset)
    }

    def rows_of(name: str) -> Iterator[np.ndarray]:
        yield from _rows_of(shard, shard.tensors[name], grown)
        shard.forget(name)

    yield from write_shard(out, entries, rows_of, shard.metadata)


def _rows_of(shard: SafetensorsFile, tensor: StoredTensor, grown: Grown) -> Iterator[np.ndarray]:
    rows = shard.rows(tensor.name)
    if tensor.name not in LARGER:
        yield rows
        return
    stored = Stored(rows, GGMLQuantizationType[tensor.dtype], tensor.shape[1])
    yield from spliced(rows, mean_rows(stored, grown), grown.first)


def _name_tokens(out: Path, folder: HFFolder, added: Added) -> None:
    """Tell of the new tokens in every file that lists added ones."""
    if folder.tokenizer is not None:
        told = read_json(out / TOKENIZER, LARGEST_FILE)
        told["added_tokens"] = [*(told.get("added_tokens") or []), *added.listed()]
        write_json(out / TOKENIZER, told)
        _require_ids(out / TOKENIZER, added.ids)
    known = folder.tokenizer_config.added_tokens_decoder
    if known or folder.tokenizer is None:
        path = out / TOKENIZER_CONFIG
        told = read_json(path, LARGEST_FILE) if path.is_file() else {}
        # where this list begins to exist, transformers looks at no other
        others = {} if known else {str(token): one.model_dump() for token, one in folder.added_tokens.items()}
        told["added_tokens_decoder"] = {**others, **(told.get("added_tokens_decoder") or {}), **added.decoder()}
        write_json(path, told)
    if (out / ADDED).is_file():
        write_json(out / ADDED, {**read_json(out / ADDED, LARGEST_FILE), **added.ids})


def _require_ids(path: Path, ids: Mapping[str, int]) -> None:
    """Raise ExportError if the library that transformers reads this file with gives the tokens other ids: it numbers
    them itself, from the size of the vocabulary on."""
    found = Tokenizer.from_file(str(path))
    other = [text for text, token in ids.items() if found.encode(text, add_special_tokens=False).ids != [token]]
    if other:
        given = found.encode(other[0], add_special_tokens=False).ids
        raise ExportError(
            what=f"{path.name}: transformers would read {other[0]!r} as {given}, not as [{ids[other[0]]}]",
            why="its ids have gaps, or this tokenizer changes texts before it looks for tokens",
            fix="convert the checkpoint (`edgelora convert`) and add the tokens to the GGUF",
        )
