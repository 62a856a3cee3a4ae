"""An adapter on disk: exactly PEFT's two files, plus `edgelora.json`. Imports no torch: merging starts without it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from edgelora.architectures.layers import Layers
from edgelora.architectures.names import EMBEDDING, HEAD, is_norm
from edgelora.errors import AdapterError, ExportError, OutputError
from edgelora.files.atomic import refuse_existing, share, staged
from edgelora.files.contract import FILE_NAME, Contract, contract_in
from edgelora.files.safetensors import SafetensorsFile
from edgelora.peft import vera_file
from edgelora.peft.change import SHORTEST, Change, LoraPair
from edgelora.peft.fitting import rows_faults, tied_faults
from edgelora.peft.folder import (
    CONFIG,
    INVOCATION,
    TENSORS,
    VIRTUAL,
    invocation_faults,
    kind_of_folder,
    refuse_pickle,
    settings_of,
    tensors_of,
    unfit,
    without,
)
from edgelora.peft.kind import NORM, PREFIX, ROWS, Kind, Parts, row_ids
from edgelora.peft.kinds import KINDS, MAGNITUDE, kind_of
from edgelora.peft.lora_settings import with_whole_vocabulary

__all__ = [
    "CONFIG", "INVOCATION", "MAGNITUDE", "PREFIX", "SHORTEST", "TENSORS", "VIRTUAL", "Adapter", "Change", "LoraPair",
    "invocation_faults", "look_at", "only_in_torch", "read_adapter", "refuse_pickle", "refuse_to_write", "unfit",
    "write_adapter",
]  # fmt: skip

IN_TORCH = "score it there (`edgelora eval BASE --adapter FOLDER --in torch`), or train a LoRA (--method lora)"


@dataclass(frozen=True)
class Adapter:
    """A trained adapter. `tensors` has, for each HF module, the method's own tensors by their PEFT names.

    Of one that was read from its folder they stay in the file, and are read module by module where they are asked for.
    A module is a linear layer, a norm with a new weight, the embedding or the head.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, np.ndarray]]
    contract: Contract | None = None

    @property
    def kind(self) -> Kind:
        """Its row in the table of kinds."""
        kind = kind_of(self.config)
        assert kind is not None, self.config.get("peft_type")
        return kind

    @property
    def invocation(self) -> tuple[int, ...]:
        """The tokens from whose last place in a sequence on it acts (aLoRA); none for one that always does."""
        return tuple(self.config.get(INVOCATION) or ())

    @property
    def linears(self) -> list[str]:
        """The linear layers that it changes."""
        others = (EMBEDDING, HEAD)
        return [module for module in self.tensors if not is_norm(f"{module}.{NORM}") and module not in others]

    @property
    def vocabularies(self) -> list[str]:
        """The embedding and the head, where all their rows change: the embedding alone, of a base with one matrix."""
        return [one for one in (EMBEDDING, HEAD) if one in self.tensors and one not in self._with_rows]

    @property
    def token_rows(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Of the embedding and the head the ids (k,) of tokens with new rows, and these, float32 (k, d)."""
        return {
            module: (np.array(ids, np.int64), self.tensors[module][ROWS].astype(np.float32, copy=False))
            for module, ids in self._with_rows.items()
        }

    @property
    def _with_rows(self) -> dict[str, list[int]]:
        """The ids (k,) by their modules; no row is read."""
        found = {one: row_ids(self.config, one) for one in (EMBEDDING, HEAD) if self.kind.rows and one in self.tensors}
        return {module: ids for module, ids in found.items() if ids is not None}

    @property
    def norms(self) -> list[str]:
        """The norms that have new weights."""
        return [module for module in self.tensors if is_norm(f"{module}.{NORM}")]

    def change(self, module: str) -> Change:
        """What it makes of a linear layer, or of the embedding or the head; every scale folded in; float32."""
        parts = {part: value.astype(np.float32, copy=False) for part, value in self.tensors[module].items()}
        return self.kind.change(parts, self.config, module)

    def norm(self, module: str) -> np.ndarray:
        """The new weight (d,) of a norm, float32, as HF stores it: before what a family adds to it."""
        return self.tensors[module][NORM].astype(np.float32, copy=False)

    def pairs(self) -> dict[str, LoraPair]:
        """The pair of every linear layer, all in memory."""
        return {module: self.pair(module) for module in self.linears}

    def pair(self, module: str) -> LoraPair:
        """A module's LoRA pair with every scale folded into B; a DoRA's lengths.

        Raises AdapterError if what it makes of the module is no pair.
        """
        change = self.change(module)
        if change.pair is None or any(v is not None for v in (change.rows, change.columns, change.whole, change.bias)):
            raise AdapterError(
                what=f"{module}: what the {self.kind.title} makes of it is not B A",
                why=self.kind.of_input
                or "it changes whole rows, columns or biases, which two small matrices cannot say",
                fix=IN_TORCH
                if self.kind.of_input
                else "merge it into its base: `edgelora merge BASE --adapter FOLDER --out FILE`",
            )
        return change.pair


def only_in_torch(adapter: Adapter, name: str) -> ExportError:
    """The error for an adapter that no weight can hold, of the name `name`: it can leave torch by no door."""
    return ExportError(
        what=f"{name}: {adapter.kind.one} runs in torch alone",
        why=adapter.kind.of_input,
        fix=IN_TORCH,
    )


def refuse_to_write(path: Path, overwrite: bool) -> None:
    """Raise OutputError if no adapter can be written at `path`. Overwriting replaces adapters, never other folders."""
    refuse_existing(path, overwrite, folder=True)
    if path.is_dir() and any(path.iterdir()) and not (path / CONFIG).exists():
        raise OutputError(
            what=f"{path}: this is not an adapter",
            why="--overwrite replaces adapters, and would delete what stands here",
            fix="choose another --out",
        )


def write_adapter(path: Path, adapter: Adapter, *, overwrite: bool = False) -> None:
    """Write the folder `path` in one step."""
    if adapter.kind is KINDS["VERA"]:
        flat = vera_file.flat(adapter.tensors)
    else:
        flat = {
            adapter.kind.name(module, part, parts): value
            for module, parts in adapter.tensors.items()
            for part, value in parts.items()
        }
    write_folder(path, adapter.config, flat, adapter.contract, overwrite=overwrite)


def write_folder(
    path: Path, config: Mapping[str, Any], tensors: Parts, contract: Contract | None, *, overwrite: bool = False
) -> None:
    """PEFT's two files and the contract, in one step."""
    refuse_to_write(path, overwrite)
    flat = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    with staged(path, folder=True, overwrite=overwrite) as draft:
        try:
            save_file(flat, draft / TENSORS, metadata={"format": "pt"})
        except SafetensorError as e:
            raise OutputError(
                what=f"{path}: the adapter could not be written",
                why=f"{e}; nothing stands there that was not there before",
                fix="free some space or choose another disk, then run the command again",
            ) from e
        share(draft / TENSORS)
        (draft / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if contract is not None:
            (draft / FILE_NAME).write_text(contract.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_adapter(
    path: Path,
    layers: Layers,
    *,
    may_wait: bool = False,
    may_have_rows: bool = True,
    usual: Callable[[str], str] = str,
) -> Adapter:
    """Read an adapter of any of KINDS and NATIVE and hold it to the `layers` that may change: every fault at once.

    may_wait: whether it may be one that acts from its invocation on (aLoRA), which no weight can hold; may_have_rows:
    whether it may be new rows of some tokens; usual: a tensor's name as PEFT writes it today, of the one in the file.
    """
    adapter, faults = look_at(path, layers, may_wait=may_wait, may_have_rows=may_have_rows, usual=usual)
    if faults:
        raise unfit(path, faults)
    return adapter


def look_at(
    path: Path, layers: Layers, *, may_wait: bool, may_have_rows: bool, usual: Callable[[str], str] = str
) -> tuple[Adapter, list[str]]:
    """The adapter that `read_adapter` reads, and all that is wrong with it: with a fault its contract alone is of
    use."""
    settings, file = settings_of(path), SafetensorsFile(path / TENSORS)
    names = {name: usual(name) for name in file.tensors}
    settings = with_whole_vocabulary(settings, names.values())
    kind, faults = kind_of_folder(settings, may_wait, layers.vocabularies.get(EMBEDDING, (0, 0))[0])
    tensors: Mapping[str, Parts] = {}
    if kind is not None:
        if kind.rows and not may_have_rows:
            layers = replace(layers, vocabularies={})
        tensors, more_faults = tensors_of(file, names, kind, layers, {} if faults else settings)
        faults += more_faults
        if kind.rows and not faults:
            faults += rows_faults(settings, tensors, layers)
        if not faults and layers.tied and {EMBEDDING, HEAD} & set(tensors):
            faults += tied_faults(kind, tensors, settings)
            tensors = without(HEAD, tensors)
    contract = None
    try:
        contract = contract_in(path)
    except AdapterError as e:
        if not faults:
            raise
        faults.append(e.what.removeprefix(f"{path / FILE_NAME}: "))
    return Adapter(settings, tensors, contract), faults
