"""Prompt tuning, P-tuning and prefix tuning as PEFT saves them: one tensor, the encoder run once. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgelora.architectures.config import ModelConfig
from edgelora.errors import AdapterError, FileFormatError
from edgelora.files.checkpoint import read_json
from edgelora.files.contract import Contract, contract_in
from edgelora.files.safetensors import SafetensorsFile
from edgelora.peft.adapter import CONFIG, TENSORS, VIRTUAL, refuse_pickle

PREFIXED = "PREFIX_TUNING"
SAVED = "prompt_embeddings"


@dataclass(frozen=True)
class TrainedPrompt:
    """What stands before every prompt, in HF's order of rows: `embeddings` float32 (n, d) as `inputs_embeds`, or
    `keys` and `values` float32 (layers, n, KV, d_head) as `past_key_values` (keys as they are, not to be rotated)."""

    embeddings: np.ndarray | None = None
    keys: np.ndarray | None = None
    values: np.ndarray | None = None
    contract: Contract | None = None

    @property
    def length(self) -> int:
        """Positions that it takes, n."""
        if self.embeddings is not None:
            return len(self.embeddings)
        assert self.keys is not None
        return int(self.keys.shape[1])


def is_trained_prompt(path: Path) -> bool:
    """Whether the folder at `path` says that it holds one of these."""
    try:
        settings = read_json(path / CONFIG)
    except (FileFormatError, OSError):
        return False
    return isinstance(settings, dict) and settings.get("peft_type") in VIRTUAL


def read_trained_prompt(path: Path, config: ModelConfig) -> TrainedPrompt:
    """Read the folder at `path` and check it against a base. Raises AdapterError with all its faults."""
    refuse_pickle(path)
    settings = read_json(path / CONFIG)
    file = SafetensorsFile(path / TENSORS)
    prefixed = settings.get("peft_type") == PREFIXED
    heads = (config.num_key_value_heads, config.head_dim)
    width = 2 * config.num_hidden_layers * heads[0] * heads[1] if prefixed else config.hidden_size
    if faults := faults_of(settings, file, width):
        raise AdapterError(
            what=f"{path}: " + "; ".join(faults),
            why="it was trained on another base model, with settings that change more than the prompt, or is damaged",
            fix="pass the base it was trained on, or train again on this one",
        )
    values, contract = file.floats(SAVED), contract_in(path)
    if not prefixed:
        return TrainedPrompt(embeddings=values, contract=contract)
    # (n, 2 · layers · KV · d_head): of a position its layers one after the other, of a layer its key and its value
    parts = values.reshape(len(values), config.num_hidden_layers, 2, *heads).transpose(2, 1, 0, 3, 4)
    keys, values = np.ascontiguousarray(parts)
    return TrainedPrompt(keys=keys, values=values, contract=contract)


def faults_of(settings: Mapping[str, Any], file: SafetensorsFile, width: int | None = None) -> list[str]:
    """What is wrong with such a folder's settings and tensors; width: of its rows, where a base tells it."""
    faults, saved = _settings_faults(settings), file.tensors.get(SAVED)
    if saved is None or set(file.tensors) != {SAVED}:
        faults.append(f"it holds {', '.join(sorted(file.tensors)) or 'nothing'}, expected {SAVED} alone")
    elif len(saved.shape) != 2 or saved.shape[1] != (width or saved.shape[1]) or not saved.shape[0]:
        faults.append(f"{SAVED} is {saved.shape}, expected (n, {width or 'width'})")
    elif not np.isfinite(file.floats(SAVED)).all():
        faults.append(f"{SAVED} holds NaN or infinite values")
    return faults


def _settings_faults(settings: Mapping[str, Any]) -> list[str]:
    faults = []
    if settings.get("task_type") not in (None, "CAUSAL_LM"):
        faults.append(f"task_type is {settings['task_type']}, expected CAUSAL_LM")
    if settings.get("num_transformer_submodules") not in (None, 1):
        faults.append(f"num_transformer_submodules is {settings['num_transformer_submodules']}, expected 1")
    if settings.get("modules_to_save"):
        faults.append("modules_to_save is set")
    return faults
