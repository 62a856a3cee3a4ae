"""What lies in an adapter's folder: the kind that it says it is, its tensors by their modules, and every fault of both.

The tensors stay in their file until they are asked for. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgelora.architectures.layers import Layers
from edgelora.architectures.names import EMBEDDING, HEAD
from edgelora.errors import AdapterError, FileFormatError, some
from edgelora.files.checkpoint import pickle_fault, read_json
from edgelora.files.lazy import Lazy
from edgelora.files.safetensors import SafetensorsFile
from edgelora.peft import vera_file
from edgelora.peft.fitting import NO_ROWS, module_faults, rank_faults
from edgelora.peft.kind import BIAS, NORM, Kind, Parts
from edgelora.peft.kinds import KINDS, NATIVE_TYPE, SAVED_BIASES, kind_of
from edgelora.peft.lora_settings import OF_TRAINING, beyond_lora
from edgelora.peft.strangers import BEFORE, NO_KIND, why_and_fix

INVOCATION = "alora_invocation_tokens"
WAITS = f"{INVOCATION} is set: it acts from there on, and a weight on every token"
TWICE = (f".original_module.{BIAS}", f".modules_to_save.{BIAS}")  # PEFT's, with `bias: all`, beside the layer's own
OWN = tuple(f".{one}.base_layer.{NORM}" for one in (EMBEDDING, HEAD))  # the base's, beside a LoRA of the embedding
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
VIRTUAL = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")  # read by `soft_prompt.py`
PICKLE = "adapter_model.bin"  # as PEFT wrote TENSORS before it knew safetensors


def refuse_pickle(path: Path) -> None:
    """Raise AdapterError, with how to convert them, if the adapter at `path` has its tensors in a pickle only."""
    if (path / PICKLE).is_file() and not (path / TENSORS).exists():
        fault = pickle_fault(path / PICKLE)
        raise AdapterError(fault.what, fault.why, fault.fix)


def settings_of(path: Path) -> Any:
    """What its adapter_config.json says. Raises AdapterError where there is no adapter."""
    refuse_pickle(path)
    if not path.is_dir() or not (path / CONFIG).exists() or not (path / TENSORS).exists():
        raise AdapterError(
            what=f"{path}: no adapter here",
            why=f"an adapter is a folder with {CONFIG} and {TENSORS}",
            fix="`edgelora import BASE FILE --out FOLDER` makes one of a GGUF LoRA"
            if path.is_file()
            else "pass the folder that `edgelora train --out` wrote, or one saved by PEFT",
        )
    try:
        return read_json(path / CONFIG)
    except FileFormatError as e:
        raise AdapterError(e.what, e.why, "train or download the adapter again") from e


def unfit(path: Path, faults: Sequence[str]) -> AdapterError:
    """The error for an adapter with these faults."""
    if all(fault.endswith((WAITS, NO_ROWS)) for fault in faults):
        return AdapterError(
            what=f"{path}: " + "; ".join(faults),
            why="this works on the weights of linear layers, and what the adapter does is in none of them",
            fix="export it with `edgelora export` and chat with that over the base; new rows can be merged as well",
        )
    return AdapterError(f"{path}: {some(faults)}", *why_and_fix(faults))


def without(module: str, tensors: Mapping[str, Parts]) -> Mapping[str, Parts]:
    """The same, and nothing of it is read."""
    return Lazy({name: name for name in tensors if name != module}, tensors.__getitem__)


def kind_of_folder(settings: Any, may_wait: bool, n_tokens: int) -> tuple[Kind | None, list[str]]:
    """What an adapter_config.json says it is, and what is wrong with it. n_tokens: of the base, 0 where none is
    known."""
    if not isinstance(settings, dict):
        return None, [f"{CONFIG} is no table of settings"]
    kind = kind_of(settings)
    if kind is None:
        found = f"{settings.get('peft_type')}"
        found += f" {settings.get('method')}" if found == NATIVE_TYPE else ""
        why = BEFORE if found in VIRTUAL else NO_KIND
        return None, [f"{CONFIG} is that of an adapter of the kind {found}, which {why}"]
    faults = beyond_lora(settings)
    beside = {"modules_to_save": kind.saves, "trainable_token_indices": kind.rows, "lora_bias": kind.adds_bias}
    faults += [f"{key} is set in {kind.one}" for key, has in beside.items() if settings.get(key) and not has]
    if settings.get(INVOCATION):
        faults += invocation_faults(settings, kind, may_wait, n_tokens)
    if settings.get("bias", "none") not in ("none", *(SAVED_BIASES if kind.saves else ())):
        faults.append("it has biases")
    return kind, faults + kind.faults(settings)


def invocation_faults(settings: Mapping[str, Any], kind: Kind, may_wait: bool, n_tokens: int) -> list[str]:
    """What is wrong with the tokens of an aLoRA over a base of so many (0: nobody knows), and with its being one unless
    it `may_wait`."""
    tokens = settings[INVOCATION]
    if not isinstance(tokens, list) or not all(isinstance(one, int) and one >= 0 for one in tokens):
        return [f"{INVOCATION} is {tokens}, expected token ids"]
    if kind is not KINDS["LORA"]:
        return [f"{INVOCATION} is set in {kind.one}"]
    if n_tokens and max(tokens) >= n_tokens:
        return [f"{INVOCATION} holds {max(tokens)}, and the base has {n_tokens} tokens"]
    return [] if may_wait else [WAITS]


def tensors_of(
    file: SafetensorsFile, names: Mapping[str, str], kind: Kind, layers: Layers, settings: Mapping[str, Any]
) -> tuple[Mapping[str, Parts], list[str]]:
    """The tensors by their modules, which stay in the file until they are asked for; and every fault.

    names: what each would be called by PEFT of today; settings: what they must be as, where that is sound.
    """
    if kind is KINDS["VERA"]:
        return vera_file.read(file, layers.linears)
    places: dict[str, dict[str, str]] = {}
    faults: list[str] = []
    for name, tensor in file.tensors.items():
        if kind is KINDS["ADALORA"] and 0 in tensor.shape:
            continue  # a layer that lost all its ranks
        usual = names[name]
        if (kind.saves and usual.endswith(TWICE)) or (kind.of_embedding and usual.endswith(OWN)):
            continue
        if any(part in name for part in OF_TRAINING):
            continue
        place = kind.place(usual)
        if place is None:
            faults.append(f"{name} is no part of {kind.one}")
        elif place[1] in places.get(place[0], {}):
            faults.append(f"{name} is there twice")
        else:
            places.setdefault(place[0], {})[place[1]] = name
    tensors = Lazy(places, lambda parts: {part: file.floats(name) for part, name in parts.items()})
    if not tensors:
        faults.append(f"it holds no {kind.title.removeprefix('plain ')} tensors")
    for module, parts in tensors.items():
        faults += module_faults(kind, module, parts, layers) or rank_faults(settings, module, parts)
    return tensors, faults
