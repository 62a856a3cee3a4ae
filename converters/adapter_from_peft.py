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

import numpy as np

from converters.from_elsewhere import complete, fitting, part_faults, require_none
from edgelora.architectures.names import EMBEDDING, HEAD
from edgelora.base import ggml
from edgelora.base.model import Base
from edgelora.files.checkpoint import read_json
from edgelora.files.lazy import Lazy
from edgelora.files.safetensors import SafetensorsFile
from edgelora.peft.adapter import (
    CONFIG,
    INVOCATION,
    MAGNITUDE,
    TENSORS,
    Adapter,
    invocation_faults,
    refuse_pickle,
)
from edgelora.peft.fitting import head_of, rank_faults
from edgelora.peft.kind import EMBEDDING_A, EMBEDDING_B, ROWS, Parts, row_ids
from edgelora.peft.kinds import kind_of
from edgelora.peft.lora_config import StoredPair, adapter_of
from edgelora.peft.lora_settings import OF_TRAINING, beyond_lora
from edgelora.peft.strangers import no_linear
from edgelora.peft.targets import by_pattern

WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# In front of the decoder's own names: PEFT's, those of models that also see, of DataParallel.
PREFIX = re.compile(
    r"^(module\.)?(base_model\.model\.)?(model\.language_model\.(model\.)?|language_model\.model\.)?(model\.)?"
)
PART = re.compile(rf"^(?P<module>.+)\.(?P<part>lora_A|lora_B|{MAGNITUDE})(\.(?!(weight|bias)$)\w+)?(\.weight)?$")
# The adapter's own name, which PEFT takes out of those of tensors.
ADAPTER = re.compile(
    rf"(?P<part>\.(lora_A|lora_B|lora_E|{MAGNITUDE}|{EMBEDDING_A}|{EMBEDDING_B}|{ROWS}|ia3_l))\.(?!(weight|bias)$)\w+"
)
SAMPLED, FAR = 64, 0.5  # rows; of their size


def read_peft(path: Path, base: Base) -> Adapter:
    """The LoRA, aLoRA or DoRA in a folder of PEFT's. Raises AdapterError with all its faults, FileFormatError."""
    refuse_pickle(path)
    settings, file = read_json(path / CONFIG), SafetensorsFile(path / TENSORS)
    faults = _settings_faults(settings, base)
    readable = not faults  # else no α may be in them
    places: dict[str, dict[str, str]] = {}
    for name in file.tensors:
        if any(part in name for part in OF_TRAINING):
            continue
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
    """What PEFT saves of an embedding: new rows of tokens, all of it, or a LoRA. Where it is the head too, of both."""
    kind = adapter.kind
    saved_twice = EMBEDDING in adapter.tensors and (kind.rows or kind.saves or kind.of_embedding)
    if not saved_twice or HEAD in base.vocabularies:
        return adapter

    def parts_of(module: str) -> Parts:
        return head_of(adapter.tensors[EMBEDDING]) if module == HEAD else adapter.tensors[module]

    places = {module: module for module in (*adapter.tensors, HEAD)}
    return replace(adapter, tensors=Lazy(places, parts_of), config=_of_both(adapter))


def _of_both(adapter: Adapter) -> dict[str, Any]:
    """The settings of a LoRA whose embedding is the head too, as PEFT has them over a base with two matrices."""
    settings, parts = dict(adapter.config), adapter.tensors[EMBEDDING]
    ids, targets = settings.get("trainable_token_indices"), settings.get("target_modules")
    if ROWS in parts and ids:
        settings["trainable_token_indices"] = dict.fromkeys(map(_end, (EMBEDDING, HEAD)), row_ids(settings, EMBEDDING))
    if EMBEDDING_A in parts:
        either = f"({targets})|{HEAD}" if isinstance(targets, str) else [*dict.fromkeys([*(targets or ()), HEAD])]
        settings["target_modules"] = either
    return settings


def _end(module: str) -> str:
    return module.rpartition(".")[2]


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


def usual_name(name: str) -> str:
    """What PEFT of today calls a tensor, of any kind of adapter, that an older one or another trainer called `name`."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    inside = PREFIX.sub("", ADAPTER.sub(r"\g<part>", name), count=1)
    return f"base_model.model.{inside}" if inside.startswith(f"{HEAD}.") else f"base_model.model.model.{inside}"


def require_own_vocabulary(path: Path, base: Base) -> None:
    """Raise AdapterError if the embedding or head that PEFT saved beside a LoRA of it, and computes with, is another
    than the base's: further from that than any quantization."""
    file, faults = SafetensorsFile(path / TENSORS), []
    for name in file.tensors:
        module = usual_name(name).removeprefix("base_model.model.").removesuffix(".base_layer.weight")
        if name.endswith(".base_layer.weight") and module in base.layers.matrices:
            rows, kind, columns = base.tensors.matrix(f"{module if module in base.vocabularies else EMBEDDING}.weight")
            theirs, at = file.floats(name), np.linspace(0, len(rows) - 1, SAMPLED, dtype=np.int64)
            own = ggml.dequantize(np.ascontiguousarray(rows[at]), kind, columns)
            if len(theirs) != len(rows) or np.linalg.norm(theirs[at] - own) > FAR * np.linalg.norm(own):
                faults.append(f"{module}: the matrix {theirs.shape} that is saved with it is not the base's")
    require_none(path, faults, base)


def _settings_faults(settings: dict[str, Any], base: Base) -> list[str]:
    kind = kind_of(settings)
    if kind is None:
        return [f"{CONFIG} is that of the kind {settings.get('peft_type')}"]
    faults = beyond_lora(settings)
    if settings.get("bias", "none") != "none":
        faults.append(f"it has biases (bias: {settings['bias']})")
    if settings.get(INVOCATION):
        faults += invocation_faults(settings, kind, may_wait=True, n_tokens=base.config.vocab_size)
    return faults + kind.faults(settings)
