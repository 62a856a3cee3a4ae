"""A checkpoint + adapters → a checkpoint: the same shards and files, weights merged a few rows at a time. No torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType

from converters.adapted import Deltas, added_biases, of_checkpoint, settings_for
from converters.base_to_gguf import ELEMENTS_AT_ONCE, Slab
from converters.hf_folder import ShardEntry, write_json, write_shard
from converters.merge import Part, lineage_of, quantized
from edgelora.base import ggml
from edgelora.base.model import Base
from edgelora.errors import ConfigError, ExportError
from edgelora.files.checkpoint import CONFIG, INDEX, Checkpoint
from edgelora.files.contract import CHECKPOINT_LINEAGE, FILE_NAME
from edgelora.files.safetensors import SafetensorsFile, StoredTensor
from edgelora.progress import OnProgress, Pace, Progress, silent

# What goes along beside the weights and config.json. The model card does not: it describes the base.
BESIDE = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "LICENSE",
)  # fmt: skip
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def write_merged_folder(
    out: Path, base: Base, parts: Sequence[Part], dtype: str | None = None, on_progress: OnProgress = silent
) -> None:
    """Fill the folder `out` (a staged path). `dtype`: F32, F16 or BF16 for all tensors; None: each as it is stored.

    Raises ConfigError for another dtype; ExportError if the base is a GGUF, and, naming the tensor, if a merged weight
    does not fit.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--hf-dtype {dtype}", "a checkpoint holds floats", f"choose one of {', '.join(DTYPES)}")
    source = base.source
    if not isinstance(source, Checkpoint):
        raise ExportError(
            what=f"{base.path}: a GGUF does not become a Hugging Face folder",
            why="it lacks the files that describe one, and quantized weights would pass for an original",
            fix="merge into the checkpoint that it was made from, or choose another --to, such as F16",
        )
    settings, added = _new_biases(base, parts)
    deltas = Deltas([(of_checkpoint(part.adapter, base), part.scale) for part in parts])
    pace = Pace(len(source.tensors) + len(added))
    for shard in source.shards:
        for _ in _write_shard(out / shard.path.name, shard, deltas, dtype, added):
            _, eta = pace.step(0)
            on_progress(Progress("merge", pace.done, pace.total, eta_s=eta))
    _write_beside(out, base, parts, dtype, settings)


def _new_biases(base: Base, parts: Sequence[Part]) -> tuple[list[str], dict[str, str]]:
    """The settings of config.json that have to be on, and for each weight whose layer then gets a bias, its name."""
    settings = settings_for(base, added_biases(base, [part.adapter for part in parts if part.scale]))
    layers = {layer for name in settings for layer in base.architecture.bias_settings[name]} - set(base.biased)
    modules = [module for module in base.linears if module.split(".", 3)[3] in layers]
    return settings, {f"{module}.weight": f"{module}.bias" for module in modules}


def _write_shard(
    out: Path, shard: SafetensorsFile, deltas: Deltas, dtype: str | None, added: Mapping[str, str]
) -> Iterator[str]:
    """Write one file, a new bias behind its weight; yields the name of each tensor once it is written."""
    entries: dict[str, ShardEntry] = {}
    for t in sorted(shard.tensors.values(), key=lambda t: t.offset):
        entries[t.name] = ShardEntry(t.shape, dtype or t.dtype)
        if t.name in added:
            entries[added[t.name]] = ShardEntry(t.shape[:1], dtype or t.dtype)

    def rows_of(name: str) -> Iterator[np.ndarray]:
        kind = GGMLQuantizationType[entries[name].dtype]
        if name in shard.tensors:
            yield from _merged(shard, shard.tensors[name], deltas, kind)
            shard.forget(name)
        else:
            zeros = Slab(0, 0, np.zeros((1, *entries[name].shape), np.float32))
            yield quantized(deltas.merged(name, zeros), kind, name)

    yield from write_shard(out, entries, rows_of, shard.metadata)


def _merged(
    shard: SafetensorsFile, tensor: StoredTensor, deltas: Deltas, kind: GGMLQuantizationType
) -> Iterator[np.ndarray]:
    """The tensor as `kind`, uint8 (n, bytes per row), a few rows at a time."""
    rows, stored = shard.rows(tensor.name), GGMLQuantizationType[tensor.dtype]
    columns = tensor.shape[-1] if tensor.shape else 1
    step = max(1, ELEMENTS_AT_ONCE // max(columns, 1))
    for first in range(0, len(rows), step):
        slab = Slab(0, first, ggml.dequantize(rows[first : first + step], stored, columns))
        yield quantized(deltas.merged(tensor.name, slab), kind, tensor.name)


def _write_beside(out: Path, base: Base, parts: Sequence[Part], dtype: str | None, settings: Sequence[str]) -> None:
    """config.json with the lineage, the index, the contract, and the files that go along as they are."""
    source = base.source
    assert isinstance(source, Checkpoint)
    stated = {} if dtype is None else {"torch_dtype" if "torch_dtype" in source.config else "dtype": DTYPES[dtype]}
    biased = dict.fromkeys(settings, True)
    write_json(out / CONFIG, {**source.config, **stated, **biased, CHECKPOINT_LINEAGE: lineage_of(base, parts)})
    if len(source.shards) > 1:
        shards = [SafetensorsFile(out / shard.path.name) for shard in source.shards]
        total = sum(t.size_bytes for shard in shards for t in shard.tensors.values())
        weight_map = {name: shard.path.name for shard in shards for name in shard.tensors}
        write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for name in BESIDE:
        if (file := base.path / name).is_file():
            shutil.copyfile(file, out / name)
    if base.chosen_template is not None:
        (out / "chat_template.jinja").write_text(base.chosen_template, encoding="utf-8", newline="\n")
    contract = next((p.adapter.contract for p in parts if p.scale and p.adapter.contract is not None), None)
    if contract is not None:
        unsigned = contract.model_copy(update={"certificate": None})
        (out / FILE_NAME).write_text(unsigned.model_dump_json(indent=2) + "\n", encoding="utf-8")
