"""What adapters make of each tensor of a model, a few rows at a time: weights, biases and norms. Imports no torch.

A bias that a layer had not is a new tensor, of that layer in every block: a model has it everywhere or nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from converters.adapter_to_gguf import gguf_changes
from converters.base_to_gguf import Slab
from edgelora.architectures.names import EMBEDDING, HEAD
from edgelora.base.model import Base
from edgelora.errors import ExportError
from edgelora.files.lazy import Lazy
from edgelora.peft.adapter import Adapter, only_in_torch
from edgelora.peft.change import Change

Delta = Callable[[np.ndarray, slice], np.ndarray]
"""What is added to these rows of a tensor, float32 (n, columns), of which the slice says which they are."""


@dataclass(frozen=True)
class Adapted:
    """What one adapter makes of a model's tensors, by their names in the file. Each is read where it is asked for."""

    weights: Mapping[str, Change]
    biases: Mapping[str, Change]
    norms: Mapping[str, np.ndarray]
    """The new weights (d,), as the file stores them."""
    token_rows: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """The ids (k,) of tokens with new rows, and these (k, d)."""

    def delta(self, tensor: str) -> Delta | None:
        """None for a tensor that stays as it is."""
        if tensor in self.weights:
            change = self.weights[tensor]
            return lambda weight, rows: change.of(rows).change(weight)
        if tensor in self.biases:
            of_bias = self.biases[tensor]
            return lambda bias, _: of_bias.change_of_bias(bias.reshape(-1)).reshape(bias.shape)
        if tensor in self.norms:
            norm = self.norms[tensor]
            return lambda weight, _: norm - weight
        if tensor in self.token_rows:
            return partial(_of_tokens, *self.token_rows[tensor])
        return None


def _of_tokens(ids: np.ndarray, values: np.ndarray, weight: np.ndarray, rows: slice) -> np.ndarray:
    """What is added to these rows of the embedding or the head (n, d)."""
    change = np.zeros_like(weight)
    here = (ids >= rows.start) & (ids < rows.stop)
    at = ids[here] - rows.start
    change[at] = values[here] - weight[at]
    return change


def of_gguf(adapter: Adapter, base: Base) -> Adapted:
    """By GGUF's names, in its order of rows, a family's shift in the norms."""
    weights, shift = gguf_changes(adapter, base), np.float32(base.architecture.norm_shift)
    return Adapted(
        weights,
        Lazy({f"{name.removesuffix('.weight')}.bias": name for name in weights}, weights.__getitem__),
        Lazy({base.tensor_of(m): m for m in adapter.norms}, lambda module: adapter.norm(module) + shift),
        {base.tensor_of(module): rows for module, rows in adapter.token_rows.items()},
    )


def of_checkpoint(adapter: Adapter, base: Base) -> Adapted:
    """By HF's names. Raises ExportError for what no weight can hold."""
    if adapter.kind.of_input:
        raise only_in_torch(adapter, "merge")
    weights = {f"{module}.weight": module for module in (*adapter.linears, *adapter.vocabularies)}
    rows = {f"{module}.weight": some for module, some in adapter.token_rows.items()}
    # some checkpoints hold the one matrix of both twice, and transformers ties what is the same alone
    tied, embedding, head = base.config.tie_word_embeddings, f"{EMBEDDING}.weight", f"{HEAD}.weight"
    if tied and embedding in weights:
        weights[head] = EMBEDDING
    if tied and embedding in rows:
        rows[head] = rows[embedding]
    return Adapted(
        Lazy(weights, adapter.change),
        Lazy({f"{module}.bias": module for module in adapter.linears}, adapter.change),
        Lazy({f"{module}.weight": module for module in adapter.norms}, adapter.norm),
        rows,
    )


class Deltas:
    """What adapters at their scales add to the tensors of a base. Those of one tensor are in memory at a time."""

    def __init__(self, adapters: Sequence[tuple[Adapted, float]]) -> None:
        self._adapters = [(adapted, scale) for adapted, scale in adapters if scale]
        self.touched = {
            name
            for one, _ in self._adapters
            for names in (one.weights, one.biases, one.norms, one.token_rows)
            for name in names
        }
        self._name, self._own = "", list[tuple[Delta, float]]()

    def merged(self, name: str, slab: Slab) -> np.ndarray:
        """The rows of a slab with every change added, float32."""
        before, rows = slab.floats, slice(slab.first, slab.first + len(slab.floats))
        merged = before.copy() if name in self.touched else before
        with np.errstate(over="ignore", invalid="ignore"):  # whoever quantizes it names the tensor
            for delta, scale in self._of(name):
                change = delta(before, rows)
                change *= scale
                merged += change
        return merged

    def _of(self, name: str) -> list[tuple[Delta, float]]:
        if name != self._name:
            found = ((adapted.delta(name), scale) for adapted, scale in self._adapters)
            self._name, self._own = name, [(delta, scale) for delta, scale in found if delta is not None]
        return self._own


def added_biases(base: Base, adapters: Iterable[Adapter]) -> list[str]:
    """The linear layers, by their full HF names, that get a bias which the base lacks."""
    wanted = {
        module.split(".", 3)[3] for adapter in adapters if adapter.kind.adds_bias for module in adapter.linears
    } - set(base.biased)
    return [module for module in base.linears if module.split(".", 3)[3] in wanted]


def require_biases(base: Base, added: Iterable[str]) -> None:
    """Raise ExportError if llama.cpp loads no bias for one of these layers."""
    loaded = base.architecture.llama_cpp.biases
    if other := sorted({module.split(".", 3)[3] for module in added} - set(loaded)):
        raise ExportError(
            what=f"{base.path}: llama.cpp has no bias for {', '.join(other)} of this family",
            why=f"a file of the architecture {base.architecture.gguf_name} that holds one does not load",
            fix="train with --target-modules " + " --target-modules ".join(_ends(base, loaded))
            + ", whose biases it loads; or merge into a Hugging Face folder (--to HF) where that has them",
        )  # fmt: skip


def settings_for(base: Base, added: Iterable[str]) -> list[str]:
    """The settings of config.json that give these layers a bias. Raises ExportError where there are none."""
    wanted = {module.split(".", 3)[3] for module in added}
    settings = [name for name, layers in base.architecture.bias_settings.items() if wanted & set(layers)]
    known = {layer for name in settings for layer in base.architecture.bias_settings[name]}
    if other := sorted(wanted - known):
        raise ExportError(
            what=f"{base.path}: transformers has no bias for {', '.join(other)} of this family",
            why="it would leave out what the adapter learned, without a word",
            fix="merge into a GGUF, where llama.cpp loads them, or train with --target-modules",
        )
    return settings


def _ends(base: Base, loaded: Iterable[str]) -> list[str]:
    there = {module.split(".", 3)[3] for module in base.linears}
    return [layer.rpartition(".")[2] for layer in loaded if layer in there]
