"""A checkpoint → the same with rows for more tokens: its shards, config.json and tokenizer files. Imports no torch.

All tensors but the embedding and the head are copied byte for byte; of those files that describe a tokenizer only what
names tokens changes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from tokenizers import Tokenizer

from converters.add_tokens import mean_rows, spliced
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
    _write_json(out / CONFIG, {**source.config, "vocab_size": grown.n_tokens})
    if len(source.shards) > 1:
        index = read_json(base.path / INDEX)
        metadata = index.get("metadata")
        shards = [SafetensorsFile(out / shard.path.name) for shard in source.shards]
        total = sum(tensor.size_bytes for shard in shards for tensor in shard.tensors.values())
        index["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": total}
        _write_json(out / INDEX, index)
    ids = dict(zip(grown.texts, grown.ids, strict=True))
    _name_tokens(out, HFFolder(base.path), Added(ids, control, base.vocabulary.strip_after_special))


def _write_shard(out: Path, shard: SafetensorsFile, grown: Grown) -> Iterator[None]:
    """Write one file; yields after each of its tensors."""
    tensors = sorted(shard.tensors.values(), key=lambda tensor: tensor.offset)
    header: dict[str, Any] = {"__metadata__": shard.metadata} if shard.metadata else {}
    end = 0
    for tensor in tensors:
        larger = tensor.name in LARGER
        shape = (grown.n_tokens, tensor.shape[1]) if larger else tensor.shape
        begin, end = end, end + (tensor.size_bytes // tensor.shape[0] * shape[0] if larger else tensor.size_bytes)
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with out.open("wb") as f:
        f.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors:
            for rows in _rows_of(shard, tensor, grown):
                f.write(np.ascontiguousarray(rows).data)
            shard.forget(tensor.name)
            yield


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
        _write_json(out / TOKENIZER, told)
        _require_ids(out / TOKENIZER, added.ids)
    known = folder.tokenizer_config.added_tokens_decoder
    if known or folder.tokenizer is None:
        path = out / TOKENIZER_CONFIG
        told = read_json(path, LARGEST_FILE) if path.is_file() else {}
        # where this list begins to exist, transformers looks at no other
        others = {} if known else {str(token): one.model_dump() for token, one in folder.added_tokens.items()}
        told["added_tokens_decoder"] = {**others, **(told.get("added_tokens_decoder") or {}), **added.decoder()}
        _write_json(path, told)
    if (out / ADDED).is_file():
        _write_json(out / ADDED, {**read_json(out / ADDED, LARGEST_FILE), **added.ids})


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


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
