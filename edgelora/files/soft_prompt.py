"""Soft prompts and prefixes as a GGUF keeps them: what stands before a prompt and is no token.

Both are files of `general.type` "adapter" like a LoRA's, of an `adapter.type` of ours, which llama.cpp's own loader
refuses by name. `soft_prompt` (prompt tuning, arXiv:2104.08691; P-tuning, arXiv:2103.10385): embeddings (n, d) as
llama.cpp takes them: of some families it scales them. `prefix` (prefix tuning, arXiv:2101.00190): keys and values
(n, KV, d_head) of every layer as its cache holds them: keys rotated for the positions 0 … n - 1, in the order of
llama.cpp's rows. What PEFT saves is what attention reads, so no rotation is applied to it. A prefix also says what
follows some prompts with it and without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFValueType

from edgelora.errors import AdapterError, some
from edgelora.files.gguf import GGUFFile

SOFT_PROMPT, PREFIX = "soft_prompt", "prefix"
EMBEDDINGS, KEYS, VALUES = "prompt.embeddings", "blk.{}.prefix_k", "blk.{}.prefix_v"
TOKENS, LOGITS, BASE_LOGITS = "reference.tokens", "reference.logits", "reference.base_logits"
N_REFERENCES, MAX_REFERENCE_TOKENS = 8, 16  # all are evaluated at each load
ANY_CONTEXT = 1 << 31
FLOATS, INTEGERS = GGMLQuantizationType.F32, GGMLQuantizationType.I32


class Dims(Protocol):
    """Of a base, in the names of `ModelConfig`."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


@dataclass(frozen=True)
class SoftPrompt:
    """`embeddings` float32 (n, d)."""

    embeddings: np.ndarray

    @property
    def length(self) -> int:
        """Positions that it takes, n."""
        return len(self.embeddings)


@dataclass(frozen=True)
class Reference:
    """What torch computes behind some prompts: `tokens` int32 (8, T), from the first position behind the prefix on;
    `logits` float32 (8, V) that follow them with the prefix, `base_logits` without."""

    tokens: np.ndarray
    logits: np.ndarray
    base_logits: np.ndarray


@dataclass(frozen=True)
class Prefix:
    """`keys` and `values` float32 (layers, n, KV, d_head), in llama.cpp's order of rows."""

    keys: np.ndarray
    values: np.ndarray
    reference: Reference

    @property
    def length(self) -> int:
        """Positions that it takes, n."""
        return int(self.keys.shape[1])


def is_soft(file: GGUFFile) -> bool:
    """Whether the file says that it is one of these; it may still be damaged."""
    kind = file.metadata.get("adapter.type")
    return kind is not None and kind.type == GGUFValueType.STRING and kind.data in (SOFT_PROMPT, PREFIX)


def read_soft(file: GGUFFile, architecture: str, dims: Dims, context: int) -> SoftPrompt | Prefix:
    """What stands in `file`, copied out of it.

    context: how many tokens the base can see. Raises AdapterError, with all faults, if it does not fit the base.
    """
    kind = file.get("adapter.type", str, "")
    found = {name: info.shape for name, info in file.tensors.items()}
    n = _length(found, kind)
    faults = _key_faults(file, architecture)
    if not 0 < n < context:
        faults.append(f"it is {n} positions long, 1 to {context - 1} can be")
    else:
        faults += _tensor_faults(file, _wanted(found, kind, n, dims))
    if not faults and kind == PREFIX and not _within(_array(file, TOKENS), dims.vocab_size):
        faults.append(f"{TOKENS} holds ids that the base has not")
    if faults:
        raise AdapterError(
            what=f"{file.path}: {some(faults)}",
            why="it belongs to another base, or was damaged",
            fix="export it again for this base",
        )
    if kind == SOFT_PROMPT:
        return SoftPrompt(_array(file, EMBEDDINGS))
    keys, values = (
        np.stack([_array(file, name.format(i)) for i in range(dims.num_hidden_layers)]) for name in (KEYS, VALUES)
    )
    return Prefix(keys, values, Reference(*(_array(file, name) for name in (TOKENS, LOGITS, BASE_LOGITS))))


def _length(shapes: Mapping[str, tuple[int, ...]], kind: str) -> int:
    """How many positions it takes, by its first tensor; 0 if there is none."""
    return shapes.get(EMBEDDINGS if kind == SOFT_PROMPT else KEYS.format(0), (0,))[0]


def _key_faults(file: GGUFFile, architecture: str) -> list[str]:
    faults = []
    for key, value in {"general.type": "adapter", "general.architecture": architecture}.items():
        found = file.metadata.get(key)
        if found is None or found.type != GGUFValueType.STRING or found.data != value:
            faults.append(f"{key} is {'missing' if found is None else repr(found.data)}, expected {value!r}")
    return faults


def _wanted(
    found: Mapping[str, tuple[int, ...]], kind: str, n: int, dims: Dims
) -> dict[str, tuple[GGMLQuantizationType, tuple[int, ...]]]:
    """The type and shape of every tensor that it must have."""
    if kind == SOFT_PROMPT:
        return {EMBEDDINGS: (FLOATS, (n, dims.hidden_size))}
    part = (FLOATS, (n, dims.num_key_value_heads, dims.head_dim))
    wanted = {name.format(i): part for i in range(dims.num_hidden_layers) for name in (KEYS, VALUES)}
    n_tokens = min(found.get(TOKENS, (0, 1))[-1], MAX_REFERENCE_TOKENS)
    rows = (FLOATS, (N_REFERENCES, dims.vocab_size))
    return {**wanted, TOKENS: (INTEGERS, (N_REFERENCES, n_tokens)), LOGITS: rows, BASE_LOGITS: rows}


def _tensor_faults(file: GGUFFile, wanted: Mapping[str, tuple[GGMLQuantizationType, tuple[int, ...]]]) -> list[str]:
    faults = [f"{name} has no place in it" for name in file.tensors if name not in wanted]
    for name, (kind, shape) in wanted.items():
        info = file.tensors.get(name)
        if info is None:
            faults.append(f"{name} is missing")
        elif (info.type, info.shape) != (kind, shape):
            faults.append(f"{name} is {info.type.name} {info.shape}, expected {kind.name} {shape}")
        elif not np.isfinite(_array(file, name)).all():
            faults.append(f"{name} holds NaN or infinite values")
    return faults


def _array(file: GGUFFile, name: str) -> np.ndarray:
    """A tensor of 32-bit numbers, copied."""
    info = file.tensors[name]
    dtype = np.int32 if info.type == INTEGERS else np.float32
    return file.rows(name).copy().view(dtype).reshape(info.shape)


def _within(ids: np.ndarray, n: int) -> bool:
    return bool(((ids >= 0) & (ids < n)).all())


@dataclass(frozen=True)
class _OwnDims:
    """What a base must be like for a file."""

    hidden_size: int
    num_hidden_layers: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int


def require_sound(file: GGUFFile) -> None:
    """Check one without a base: raises AdapterError unless it fits some."""
    shapes = {name: info.shape for name, info in file.tensors.items()}
    keys, rows = shapes.get(KEYS.format(0), ()), shapes.get(LOGITS, ())
    heads, width = keys[1:] if len(keys) == 3 else (0, 0)
    layers = 1 + max((i for i in range(len(shapes)) if KEYS.format(i) in shapes), default=0)
    dims = _OwnDims(shapes.get(EMBEDDINGS, (0,))[-1], layers, heads, width, rows[-1] if rows else 0)
    read_soft(file, file.architecture, dims, ANY_CONTEXT)
