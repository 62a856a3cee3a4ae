"""The tensors of a base by their HF names and in HF's row order, whatever file holds them. Imports no torch.

Nothing is dequantized, and only what must move is copied: GGUFs of the Llama family store rotary rows in another order.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from gguf.constants import GGMLQuantizationType

from edgelora.architectures import Architecture, ModelConfig
from edgelora.architectures.names import gguf_place, hf_row_order, is_norm
from edgelora.base import ggml
from edgelora.files.checkpoint import Checkpoint
from edgelora.files.gguf import GGUFFile


class Stored(NamedTuple):
    """A matrix as it is stored: `rows` uint8 (d_out, bytes per row) of `columns` weights of type `kind` each."""

    rows: np.ndarray
    kind: GGMLQuantizationType
    columns: int

    def floats(self) -> np.ndarray:
        """float32 (d_out, columns). May be the file's own memory: copy before writing to it."""
        return ggml.dequantize(self.rows, self.kind, self.columns)


class Tensors(Protocol):
    """What a decoder, a converter or a fingerprint reads of a base."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor there is, by its HF name where it has one, else by its own."""
        ...

    def matrix(self, name: str) -> Stored:
        """A matrix as it is stored, its rows in HF's order."""
        ...

    def kind(self, name: str) -> GGMLQuantizationType:
        """How a tensor is stored; reads nothing of it."""
        ...

    def row(self, name: str, index: int) -> Stored:
        """One row of a matrix, mapped: nothing else of it is read."""
        ...

    def forget(self, name: str) -> None:
        """Let go of what was read of a matrix: it no longer counts as this process's memory."""
        ...

    def vector(self, name: str) -> np.ndarray:
        """A bias or a norm, float32 (n,). A norm is what activations are multiplied by: the family's shift is in it."""
        ...


class GGUFTensors:
    """The tensors of a GGUF file."""

    def __init__(self, file: GGUFFile, architecture: Architecture, config: ModelConfig) -> None:
        self.file, self.architecture, self.config = file, architecture, config

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.file.tensors.items()}

    def matrix(self, name: str) -> Stored:
        stored, order = self._as_in_the_file(name), self._order(name)
        return stored if order is None else stored._replace(rows=stored.rows[order])

    def kind(self, name: str) -> GGMLQuantizationType:
        return self.file.tensors[gguf_place(self.architecture, self.config, name).name].type

    def row(self, name: str, index: int) -> Stored:
        stored, order = self._as_in_the_file(name), self._order(name)
        at = index if order is None else int(order[index])
        return stored._replace(rows=stored.rows[at : at + 1])

    def forget(self, name: str) -> None:
        self.file.forget(gguf_place(self.architecture, self.config, name).name)

    def _as_in_the_file(self, name: str) -> Stored:
        place = gguf_place(self.architecture, self.config, name)
        info, rows = self.file.tensors[place.name], self.file.rows(place.name)
        if place.expert is not None:
            height = info.shape[-2]
            rows = rows[place.expert * height : (place.expert + 1) * height]
        return Stored(rows, info.type, info.shape[-1])

    def _order(self, name: str) -> np.ndarray | None:
        return hf_row_order(self.architecture, self.config, name.rpartition(".")[0])

    def vector(self, name: str) -> np.ndarray:
        place = gguf_place(self.architecture, self.config, name)
        info = self.file.tensors[place.name]
        values = ggml.dequantize(self.file.rows(place.name), info.type, info.shape[-1]).reshape(-1)
        order = self._order(name)
        return values if order is None else values[order]


class CheckpointTensors:
    """The tensors of an HF folder of safetensors."""

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture) -> None:
        self.checkpoint, self.shift = checkpoint, architecture.norm_shift

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.checkpoint.tensors.items()}

    def matrix(self, name: str) -> Stored:
        tensor = self.checkpoint.tensors[name]
        return Stored(self.checkpoint.rows(name), GGMLQuantizationType[tensor.dtype], tensor.shape[-1])

    def kind(self, name: str) -> GGMLQuantizationType:
        return GGMLQuantizationType[self.checkpoint.tensors[name].dtype]

    def row(self, name: str, index: int) -> Stored:
        stored = self.matrix(name)
        return stored._replace(rows=stored.rows[index : index + 1])

    def forget(self, name: str) -> None:
        self.checkpoint.forget(name)

    def vector(self, name: str) -> np.ndarray:
        values = self.matrix(name).floats().reshape(-1)
        return values + np.float32(self.shift) if self.shift and is_norm(name) else values
