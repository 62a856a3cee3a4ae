"""An adapter of Apple's mlx-lm → PEFT's. Its layout is that of mlx_lm/tuner/{lora,dora,utils}.py (ml-explore/mlx-lm).

There y = x Wᵀ + scale (x a) b with `lora_a` (d_in, r) and `lora_b` (r, d_out): PEFT's A and B transposed, over weights
in HF's row order. `scale` multiplies as it is, so α = scale · r here. A DoRA has its lengths in `m` (d_out,).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from converters.from_elsewhere import complete, fitting, part_faults
from edgelora.base.model import Base
from edgelora.files.checkpoint import read_json
from edgelora.files.safetensors import SafetensorsFile
from edgelora.peft.adapter import CONFIG, Adapter
from edgelora.peft.lora_config import StoredPair, adapter_of
from edgelora.peft.strangers import no_linear

TENSORS = "adapters.safetensors"
PARTS = {"lora": ("lora_a", "lora_b"), "dora": ("lora_a", "lora_b", "m")}
# Gemma 3 and others that can see hold their language model one level down.
PREFIXES = ("language_model.",)


def read_mlx(path: Path, base: Base) -> Adapter:
    """The adapter in a folder of adapters.safetensors and adapter_config.json.

    Raises AdapterError with all its faults, FileFormatError if a file is broken.
    """
    settings = read_json(path / CONFIG)
    file, faults = SafetensorsFile(path / TENSORS), _settings_faults(settings)
    scale = 0.0 if faults else float(settings["lora_parameters"]["scale"])
    wanted = PARTS.get(_kind(settings), PARTS["lora"])
    places: dict[str, dict[str, str]] = {}
    for name in file.tensors:
        module, _, part = name.rpartition(".")
        if part in wanted and len(file.tensors[name].shape) <= 2:
            places.setdefault(_without_prefix(module), {})[part] = name
        else:
            faults.append(no_linear(name))
    pairs = {module: _pair({part: file.floats(name) for part, name in parts.items()}, scale)
             for module, parts in complete(places, wanted, base).items()}  # fmt: skip
    found = fitting(path, pairs, base, faults + part_faults(places, wanted, base))
    return adapter_of(found, base.linears, str(base.path))


def _pair(parts: dict[str, np.ndarray], scale: float) -> StoredPair:
    a, b = (np.ascontiguousarray(parts[half].T) for half in ("lora_a", "lora_b"))
    return StoredPair(a, b, scale * (a.shape[0] if a.ndim else 0), parts.get("m"))


def _without_prefix(module: str) -> str:
    for prefix in PREFIXES:
        module = module.removeprefix(prefix)
    return module


def _kind(settings: dict[str, Any]) -> Any:
    """`use_dora` is how it was said before there was a `fine_tune_type`."""
    return settings.get("fine_tune_type", "dora" if settings.get("use_dora") else "lora")


def _settings_faults(settings: dict[str, Any]) -> list[str]:
    faults, kind = [], _kind(settings)
    if kind not in PARTS:
        faults.append(f"fine_tune_type is {kind}, expected lora or dora")
    parameters = settings.get("lora_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    scale, alpha, rank = (parameters.get(name) for name in ("scale", "alpha", "rank"))
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        faults.append(f"{CONFIG}: lora_parameters.scale is {scale}, expected a number")
    if alpha is not None and alpha != rank:
        faults.append(
            f"{CONFIG}: lora_parameters.alpha is {alpha} beside a scale of {scale}: the first mlx-lm multiplied both "
            f"(scale · alpha / rank), later ones leave alpha out; write the scale that was in use and delete alpha"
        )
    return faults
