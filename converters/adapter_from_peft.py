"""A folder of PEFT's, in any layout that PEFT wrote since 0.10 → the plain one that the rest of edgelora reads.

What differs between them: the wrappers that a module's name goes through (torch.compile, FSDP, a model that also sees),
the adapter's own name inside of tensor names, `.weight` behind the lengths of a DoRA, and the patterns that say where
and how strongly, whose result is written out layer by layer.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from converters.from_elsewhere import complete, fitting, part_faults
from edgelora.architectures.names import EMBEDDING, HEAD
from edgelora.base.model import Base
from edgelora.files.checkpoint import read_json
from edgelora.files.lazy import Lazy
from edgelora.files.safetensors import SafetensorsFile
from edgelora.peft.adapter import (
    BEYOND_LORA,
    CONFIG,
    INVOCATION,
    MAGNITUDE,
    TENSORS,
    Adapter,
    invocation_faults,
    refuse_pickle,
)
from edgelora.peft.fitting import rank_faults
from edgelora.peft.kinds import kind_of
from edgelora.peft.lora_config import StoredPair, adapter_of
from edgelora.peft.strangers import no_linear
from edgelora.peft.targets import by_pattern

WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# In front of the decoder's own names: PEFT's, those of models that also see, of DataParallel.
PREFIX = re.compile(
    r"^(module\.)?(base_model\.model\.)?(model\.language_model\.(model\.)?|language_model\.model\.)?(model\.)?"
)
PART = re.compile(rf"^(?P<module>.+)\.(?P<part>lora_A|lora_B|{MAGNITUDE})(\.(?!(weight|bias)$)\w+)?(\.weight)?$")


def read_peft(path: Path, base: Base) -> Adapter:
    """The LoRA, aLoRA or DoRA in a folder of PEFT's. Raises AdapterError with all its faults, FileFormatError."""
    refuse_pickle(path)
    settings, file = read_json(path / CONFIG), SafetensorsFile(path / TENSORS)
    faults = _settings_faults(settings)
    readable = not faults  # else no α may be in them
    places: dict[str, dict[str, str]] = {}
    for name in file.tensors:
        module, part = plain_name(name)
        if not part or part in places.get(module, {}):
            faults.append(f"{name} is there twice" if part else no_linear(name))
        else:
            places.setdefault(module, {})[part] = name
    wanted = ("lora_A", "lora_B", *([MAGNITUDE] if settings.get("use_dora") else []))
    pairs = {}
    for module, parts in complete(places, wanted, base).items():
        alpha = by_pattern(settings.get("alpha_pattern") or {}, module, settings["lora_alpha"]) if readable else 0.0
        a, b, *lengths = (file.floats(name) for name in parts.values())
        pairs[module] = StoredPair(a, b, alpha, *lengths)
        if readable and a.ndim == b.ndim == 2 and len(a) == b.shape[1]:  # else `fitting` says so
            faults += rank_faults(settings, module, {"lora_A": a})
    return adapter_of(
        fitting(path, pairs, base, faults + part_faults(places, wanted, base)),
        base.linears,
        str(base.path),
        rslora=bool(settings.get("use_rslora")),
        invocation=settings.get(INVOCATION) or (),
    )


def with_tied_head(adapter: Adapter, base: Base) -> Adapter:
    """New rows of tokens, or a whole embedding, as PEFT saves them: where it is the head too, as those of both."""
    saved_twice = EMBEDDING in adapter.tensors and (adapter.kind.rows or adapter.kind.saves)
    if not saved_twice or HEAD in base.vocabularies:
        return adapter
    places = {**{module: module for module in adapter.tensors}, HEAD: EMBEDDING}
    return replace(adapter, tensors=Lazy(places, adapter.tensors.__getitem__))


def plain_name(name: str) -> tuple[str, str]:
    """`base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight` → (`model.layers.0.mlp.up_proj`, `lora_A`).

    The second is empty for a tensor that is no part of a LoRA's.
    """
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    found = PART.match(name)
    if found is None:
        return name, ""
    return PREFIX.sub("model.", found["module"], count=1), found["part"]


def _settings_faults(settings: dict[str, Any]) -> list[str]:
    kind = kind_of(settings)
    if kind is None:
        return [f"{CONFIG} is that of the kind {settings.get('peft_type')}"]
    faults = [f"{key} is set" for key in BEYOND_LORA if settings.get(key)]
    if settings.get("bias", "none") != "none":
        faults.append(f"it has biases (bias: {settings['bias']})")
    if settings.get(INVOCATION):
        faults += invocation_faults(settings, kind, may_wait=True)
    return faults + kind.faults(settings)
