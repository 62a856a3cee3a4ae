"""An adapter from elsewhere → an adapter folder of ours: recognised, read, held to its base, and signed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from converters.adapter_from_gguf import read_gguf
from converters.adapter_from_mlx import TENSORS as MLX_TENSORS
from converters.adapter_from_mlx import read_mlx
from converters.adapter_from_peft import read_peft, require_own_vocabulary, usual_name, with_tied_head
from converters.exit_words import note_of_ranks
from edgelora.base.model import Base, open_base
from edgelora.config import Method
from edgelora.errors import AdapterError
from edgelora.files.adapter_check import contract_of, require_adapter
from edgelora.files.checkpoint import read_json
from edgelora.files.contract import Contract, contract_in, fault_and_contract, sha256_file
from edgelora.files.gguf import GGUFFile
from edgelora.files.safetensors import SafetensorsFile
from edgelora.files.unchanged import stamp
from edgelora.invocation import command
from edgelora.peft.adapter import (
    CONFIG,
    TENSORS,
    VIRTUAL,
    Adapter,
    read_adapter,
    refuse_pickle,
    refuse_to_write,
    write_adapter,
)
from edgelora.peft.kinds import DORA, LORA, NATIVE_TYPE, kind_of
from edgelora.peft.lora_config import as_lora
from edgelora.peft.lora_settings import with_whole_vocabulary
from edgelora.pipeline.contracts import contract_over
from edgelora.pipeline.export import read_checked, require_contract


@dataclass(frozen=True)
class Imported:
    """What was read (`kind`: GGUF, MLX or PEFT) and what stands at `path` now."""

    path: Path
    kind: str
    title: str
    """What it is, in words: `plain LoRA`."""
    method: Method
    """The method that trains such adapters."""
    layers: int
    ranks: tuple[int, ...]
    """Of its A and B; none where it has no such matrices."""
    notes: tuple[str, ...] = ()
    """What its user should know."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path)}


def import_adapter(
    base_path: Path, source: Path, out: Path, *, allow_unverified: bool = False, overwrite: bool = False
) -> Imported:
    """Write the adapter at `source` as the folder `out`, whose contract names the base at `base_path`.

    source: a GGUF LoRA, a folder of mlx-lm's, a folder of PEFT's. Without a contract of its own (all that edgelora did
    not write) it must be allowed: nothing in it says whether that is its base.
    Raises AdapterError for what cannot be a LoRA here, or is another base's, with every fault of it.
    """
    refuse_to_write(out, overwrite)
    kind, file = recognised(source)
    stamp(source).require_apart(out)
    base = open_base(base_path)
    _require_layers(kind, source, base)
    require = partial(require_contract, path=source, base=base, allow_unverified=allow_unverified)
    try:
        adapter = KINDS[kind](source, base)
    except AdapterError as fault:
        raise fault_and_contract(fault, source, partial(_contract_in, kind, source), require) from None
    require(adapter.contract)
    if adapter.contract is None:
        adapter = replace(adapter, contract=_contract(adapter, base, kind, source, file))
    write_adapter(out, adapter, overwrite=overwrite)
    return _imported(out, kind, adapter, base)


def export_as_lora(
    base_path: Path, source: Path, out: Path, *, allow_unverified: bool = False, overwrite: bool = False
) -> Imported:
    """Write the adapter in the folder `source` as a plain LoRA of PEFT's, which computes the same, bit for bit.

    Raises AdapterError if it is no LoRA: what it makes of a layer has to be W + B A.
    """
    refuse_to_write(out, overwrite)
    stamp(source).require_apart(out)
    base = open_base(base_path)
    adapter = read_checked(source, base, allow_unverified=allow_unverified)
    folded = with_tied_head(as_lora(adapter, base.linears, str(base.path)), base)
    write_adapter(out, folded, overwrite=overwrite)
    return _imported(out, "PEFT", folded, base)


def _imported(out: Path, kind: str, adapter: Adapter, base: Base) -> Imported:
    ranks = {module: len(parts["lora_A"]) for module, parts in adapter.tensors.items() if "lora_A" in parts}
    title = "aLoRA" if adapter.invocation else adapter.kind.title
    note = note_of_ranks({module: (*base.linears[module], ranks[module]) for module in base.linears if module in ranks})
    return Imported(
        out,
        kind,
        title,
        _method(adapter),
        len(adapter.tensors),
        tuple(sorted({*ranks.values()})),
        (note,) if note else (),
    )


def recognised(source: Path) -> tuple[str, Path]:
    """What `source` is, by the names of its files, and the file that holds its tensors. Raises AdapterError."""
    if source.is_file():
        return "GGUF", source
    if (source / MLX_TENSORS).is_file() and (source / CONFIG).is_file():
        return "MLX", source / MLX_TENSORS
    refuse_pickle(source)
    if (source / TENSORS).is_file() and (source / CONFIG).is_file():
        return "PEFT", source / TENSORS
    found = sorted(file.parent if file.name == CONFIG else file
                   for file in [*source.glob(f"*/{CONFIG}"), *source.glob("*.gguf")])  # fmt: skip
    names = ", ".join(str(path) for path in found[:5])
    raise AdapterError(
        what=f"{source}: no adapter here" if source.exists() else f"{source}: no such file or folder",
        why=f"an adapter is a GGUF file, or a folder with {CONFIG} and {TENSORS} (PEFT) or {MLX_TENSORS} (MLX)",
        fix=f"pass {'one of ' if len(found) > 1 else ''}{names}" if found else "check the path",
    )


def _require_layers(kind: str, source: Path, base: Base) -> None:
    """Raise AdapterError for what changes no layer, whatever its base: a whole model, or what stands before prompts."""
    if kind == "GGUF":
        require_adapter(GGUFFile(source))
    elif kind == "PEFT" and read_json(source / CONFIG).get("peft_type") in VIRTUAL:
        raise AdapterError(
            what=f"{source}: nothing to import",
            why="it stands before prompts and changes no layer, and PEFT's folder of it is the one that is read here",
            fix=f"`{command('export', base.path, source, '--out', 'FILE')}` takes this folder as it is",
        )


def _contract_in(kind: str, source: Path) -> Contract | None:
    """What is said of its training beside or inside an adapter of this kind; of mlx-lm's nothing is."""
    if kind == "GGUF":
        return contract_of(GGUFFile(source))
    return contract_in(source) if kind == "PEFT" else None


def _from_gguf(path: Path, base: Base) -> Adapter:
    adapter, contract = read_gguf(path, base)
    return replace(adapter, contract=contract)


def _from_peft(path: Path, base: Base) -> Adapter:
    settings = read_json(path / CONFIG)
    names = {usual_name(name) for name in SafetensorsFile(path / TENSORS).tensors}
    kind = kind_of(with_whole_vocabulary(settings, names))
    if kind in (LORA, DORA):
        return replace(read_peft(path, base), contract=contract_in(path))
    usual = usual_name if settings.get("peft_type") == "LORA" else str
    adapter = read_adapter(path, base.layers, may_wait=True, usual=usual)
    if adapter.kind.of_embedding:
        require_own_vocabulary(path, base)
    return with_tied_head(adapter, base)


OTHER_NAMES = {"TRAINABLE_TOKENS": "token_rows", "LN_TUNING": "layernorm"}  # PEFT's and ours, where they differ
KINDS: dict[str, Callable[[Path, Base], Adapter]] = {"GGUF": _from_gguf, "MLX": read_mlx, "PEFT": _from_peft}


def _method(adapter: Adapter) -> Method:
    """The name of the method, in the table of them, that leaves an adapter of its kind."""
    peft_type = str(adapter.config["peft_type"])
    if adapter.invocation:
        return "alora"
    if peft_type == NATIVE_TYPE:
        return cast(Method, adapter.config["method"])
    if peft_type == "LORA" and adapter.config.get("use_dora"):
        return "dora"
    return cast(Method, OTHER_NAMES.get(peft_type, peft_type.lower()))


def _contract(adapter: Adapter, base: Base, kind: str, source: Path, file: Path) -> Contract:
    """That the user named this base; what it was trained on, and how, nobody here knows."""
    imported = {"from": kind, "name": source.name, "sha256": sha256_file(file)}
    training = {"data": [], "imported": imported}
    return contract_over(base, _method(adapter), chat_template=base.chosen_template, training=training)
