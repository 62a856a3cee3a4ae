"""An adapter on disk: exactly PEFT's two files, plus `edgelora.json`. Imports no torch: merging starts without it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from edgelora.errors import AdapterError, FileFormatError, OutputError
from edgelora.files.atomic import refuse_existing, staged
from edgelora.files.checkpoint import pickle_fault, read_json
from edgelora.files.contract import FILE_NAME, Contract, read_contract
from edgelora.files.lazy import Lazy
from edgelora.files.safetensors import SafetensorsFile
from edgelora.peft import vera_file

# Settings of PEFT under which neither a LoRA nor a DoRA is what the adapter computes.
BEYOND_LORA = (
    "modules_to_save", "trainable_token_indices", "megatron_config", "alora_invocation_tokens", "use_qalora",
    "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
LARGEST_NUMBER = 1e30  # beyond any α that float32 could still multiply by
# Starts that leave the base's weights alone; PiSSA, OLoRA, CorDA and LoftQ subtract from them.
STARTS_AT_THE_BASE = ("gaussian", "eva", "orthogonal")
SHORTEST = 1e-30  # DoRA: a row of zeros, as padding a model leaves them, has a length to divide by and stays zero

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
MAGNITUDE, SINGULAR = "lora_magnitude_vector", "lora_E"
OF_A_LORA, OF_AN_ADALORA = ("lora_A", "lora_B"), ("lora_A", "lora_B", SINGULAR)
READ = ("LORA", "ADALORA", "VERA")  # by PEFT's names
PICKLE = "adapter_model.bin"  # as PEFT wrote TENSORS before it knew safetensors


@dataclass(frozen=True)
class LoraPair:
    """`a` (r, d_in) and `b` (d_out, r) float32 with every scale already in `b`: ΔW = b @ a.

    A DoRA has a `magnitude` (d_out,) float32 too: the rows of W + b @ a are brought to these lengths.
    """

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return len(self.a)

    def change(self, weight: np.ndarray) -> np.ndarray:
        """ΔW (d_out, d_in) float32: what makes of this `weight` the adapted one."""
        change: np.ndarray = self.b @ self.a
        if self.magnitude is not None:
            change += weight
            lengths = np.sqrt(np.einsum("ij,ij->i", change, change))
            change *= (self.magnitude / np.maximum(lengths, SHORTEST))[:, None]
            change -= weight
        return change


@dataclass(frozen=True)
class Adapter:
    """A trained adapter. `tensors` has, for each HF module, the method's own tensors by their PEFT names.

    Of one that was read from its folder they stay in the file, and are read module by module where they are asked for.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, np.ndarray]]
    contract: Contract | None = None

    def pairs(self) -> dict[str, LoraPair]:
        """The pair of every module, all in memory."""
        return {module: self.pair(module) for module in self.tensors}

    def pair(self, module: str) -> LoraPair:
        """A module's LoRA pair with α/r (α/√r for rsLoRA), patterns included, folded into B; a DoRA's lengths."""
        parts = self.tensors[module]
        if self.config.get("peft_type") == "VERA":
            return LoraPair(*vera_file.factors_of(parts))
        if SINGULAR in parts:
            return self._adalora_pair(parts)
        rank = len(parts["lora_A"])
        alpha = _by_pattern(self.config.get("alpha_pattern") or {}, module, self.config["lora_alpha"])
        scale = alpha / (rank**0.5 if self.config.get("use_rslora") else rank)
        a, b, magnitude = (
            parts[name].astype(np.float32, copy=False) if name in parts else None
            for name in ("lora_A", "lora_B", MAGNITUDE)
        )
        assert a is not None
        assert b is not None
        return LoraPair(a, b if scale == 1.0 else b * np.float32(scale), magnitude)

    def _adalora_pair(self, parts: Mapping[str, np.ndarray]) -> LoraPair:
        # as PEFT scales it: by the rank at the start, whatever is left of that
        scale = self.config["lora_alpha"] / (self.config["init_r"] + 1e-5)
        a, b, singular = (parts[name].astype(np.float32, copy=False) for name in OF_AN_ADALORA)
        return LoraPair(a * singular, b * np.float32(scale))


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule: a pattern is a regular expression that matches the end of a module's path, after a dot."""
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), default)


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
    refuse_to_write(path, overwrite)
    if adapter.config["peft_type"] == "VERA":
        flat = vera_file.flat(adapter.tensors)
    else:
        flat = {
            f"{PREFIX}{module}.{part}{'' if part == MAGNITUDE else '.weight'}": value
            for module, parts in adapter.tensors.items()
            for part, value in parts.items()
        }
    flat = {name: np.ascontiguousarray(value) for name, value in flat.items()}
    with staged(path, folder=True, overwrite=overwrite) as draft:
        try:
            save_file(flat, draft / TENSORS, metadata={"format": "pt"})
        except SafetensorError as e:
            raise OutputError(
                what=f"{path}: the adapter could not be written",
                why=f"{e}; nothing stands there that was not there before",
                fix="free some space or choose another disk, then run the command again",
            ) from e
        (draft / CONFIG).write_text(json.dumps(adapter.config, indent=2) + "\n", encoding="utf-8")
        if adapter.contract is not None:
            (draft / FILE_NAME).write_text(adapter.contract.model_dump_json(indent=2) + "\n", encoding="utf-8")


def refuse_pickle(path: Path) -> None:
    """Raise AdapterError, with how to convert them, if the adapter at `path` has its tensors in a pickle only."""
    if (path / PICKLE).is_file() and not (path / TENSORS).exists():
        fault = pickle_fault(path / PICKLE)
        raise AdapterError(fault.what, fault.why, fault.fix)


def read_adapter(path: Path, linears: Mapping[str, tuple[int, int]]) -> Adapter:
    """Read a LoRA, DoRA, AdaLoRA or VeRA of PEFT's and hold it to `linears` (d_out, d_in): every fault at once."""
    refuse_pickle(path)
    if not path.is_dir() or not (path / CONFIG).exists() or not (path / TENSORS).exists():
        raise AdapterError(
            what=f"{path}: no adapter here",
            why=f"an adapter is a folder with {CONFIG} and {TENSORS}",
            fix="pass the folder that `edgelora train --out` wrote, or one saved by PEFT",
        )
    try:
        settings = read_json(path / CONFIG)
    except FileFormatError as e:
        raise AdapterError(e.what, e.why, "train or download the adapter again") from e
    file = SafetensorsFile(path / TENSORS)
    faults = _settings_faults(settings)
    tensors: Mapping[str, Mapping[str, np.ndarray]]
    if isinstance(settings, dict) and settings.get("peft_type") == "VERA":
        tensors, more_faults = vera_file.read(file, linears)
    else:
        tensors, more_faults = _read_pairs(file, settings, linears)
    faults += more_faults
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise AdapterError(
            what=f"{path}: " + "; ".join(faults[:8]) + more,
            why="the adapter was trained on another base model, by another method, or is damaged",
            fix="pass the base it was trained on, or train again on this one",
        )
    contract_file = path / FILE_NAME
    contract = None
    if contract_file.exists():
        contract = read_contract(contract_file.read_text(encoding="utf-8", errors="replace"), str(contract_file))
    return Adapter(settings, tensors, contract)


def _read_pairs(
    file: SafetensorsFile, settings: Any, linears: Mapping[str, tuple[int, int]]
) -> tuple[Mapping[str, Mapping[str, np.ndarray]], list[str]]:
    """The tensors of a LoRA, DoRA or AdaLoRA, which stay in the file until they are asked for; and every fault."""
    places: dict[str, dict[str, str]] = {}
    faults: list[str] = []
    stated = settings if isinstance(settings, dict) else {}
    kind = "plain LoRA"
    wanted: tuple[str, ...] = OF_A_LORA
    if stated.get("use_dora"):
        kind, wanted = "DoRA", (*OF_A_LORA, MAGNITUDE)
    elif stated.get("peft_type") == "ADALORA":
        kind, wanted = "AdaLoRA", OF_AN_ADALORA
    for name, tensor in file.tensors.items():
        if kind == "AdaLoRA" and 0 in tensor.shape:
            continue  # a layer that lost all its ranks
        module, _, part = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if part not in wanted or not name.startswith(PREFIX):
            faults.append(f"{name} is no part of a {kind}")
        else:
            places.setdefault(module, {})[part] = name
    tensors = Lazy(places, lambda parts: {part: file.floats(name) for part, name in parts.items()})
    return tensors, faults + _tensor_faults(tensors, linears, wanted)


def _settings_faults(settings: Any) -> list[str]:
    if not isinstance(settings, dict) or settings.get("peft_type") not in READ:
        return [f"{CONFIG} is not that of a LoRA"]
    faults = [f"{key} is set" for key in BEYOND_LORA if settings.get(key)]
    if settings.get("bias", "none") != "none":
        faults.append("it has biases")
    if settings["peft_type"] == "VERA":
        return faults
    start = settings.get("init_lora_weights", True)
    if isinstance(start, str) and start not in STARTS_AT_THE_BASE:
        faults.append(f"it began by changing the base's own weights (init_lora_weights: {start})")
    if settings["peft_type"] == "ADALORA" and not (isinstance(settings.get("init_r"), int) and settings["init_r"] > 0):
        faults.append(f"init_r is {settings.get('init_r')}")
    if not _is_number(settings.get("lora_alpha")):
        faults.append(f"lora_alpha is {settings.get('lora_alpha')}")
    return faults + _pattern_faults(settings.get("alpha_pattern") or {})


def _pattern_faults(patterns: Any) -> list[str]:
    if not isinstance(patterns, dict):
        return ["alpha_pattern is no table of names and numbers"]
    faults = [f"alpha_pattern: {value} for {key}" for key, value in patterns.items() if not _is_number(value)]
    for key in patterns:
        try:
            re.compile(key)
        except re.error as e:
            faults.append(f"alpha_pattern: {key} is no regular expression ({e})")
    return faults


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER


def _tensor_faults(
    tensors: Mapping[str, Mapping[str, np.ndarray]], linears: Mapping[str, tuple[int, int]], wanted: Sequence[str]
) -> list[str]:
    faults = [] if tensors else ["it holds no LoRA tensors"]
    for module, parts in tensors.items():
        if module not in linears:
            faults.append(f"{module} is no linear layer of this model")
        elif missing := [part for part in wanted if part not in parts]:
            faults.append(f"{module}: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
        else:
            faults += [f"{module}: {fault}" for fault in _shape_faults(parts, *linears[module])]
            if not all(np.isfinite(part).all() for part in parts.values()):
                faults.append(f"{module}: it holds NaN or infinite values")
    return faults


def _shape_faults(parts: Mapping[str, np.ndarray], d_out: int, d_in: int) -> list[str]:
    a, b, magnitude, singular = parts["lora_A"], parts["lora_B"], parts.get(MAGNITUDE), parts.get(SINGULAR)
    rank = a.shape[0] if a.ndim == 2 else 0
    faults = []
    if a.shape != (rank, d_in) or b.shape != (d_out, rank) or not rank:
        faults.append(f"lora_A is {a.shape} and lora_B {b.shape}, expected (r, {d_in}) and ({d_out}, r)")
    if singular is not None and singular.shape != (rank, 1):
        faults.append(f"{SINGULAR} is {singular.shape}, expected ({rank}, 1)")
    if magnitude is not None and magnitude.shape != (d_out,):
        faults.append(f"{MAGNITUDE} is {magnitude.shape}, expected ({d_out},)")
    return faults
