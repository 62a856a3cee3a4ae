"""What is in an adapter: PEFT's folder or a GGUF. Without a base at hand it is held to itself only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from converters.exit_facts import DOWN
from converters.exit_plan import Door
from edgelora.errors import AdapterError, EdgeloraError
from edgelora.files.adapter_check import check_adapter, contract_of, own_shapes
from edgelora.files.checkpoint import read_json
from edgelora.files.contract import Contract, contract_in
from edgelora.files.gguf import GGUFFile
from edgelora.files.safetensors import SafetensorsFile
from edgelora.files.soft_prompt import is_soft, require_sound
from edgelora.peft.adapter import CONFIG, IN_TORCH, PREFIX, TENSORS, Adapter, read_adapter, refuse_pickle
from edgelora.peft.change import Change
from edgelora.peft.fitting import layers_told
from edgelora.peft.kinds import kind_of
from edgelora.peft.lora_settings import with_whole_vocabulary
from edgelora.peft.of_weight import InPlaceOf
from edgelora.peft.soft_prompt import faults_of, is_trained_prompt
from edgelora.pipeline.inspect_facts import Ability, TypeShare, certificate_of, contract_facts, reason, shares, stated

CHAT_OF_A_FOLDER = Ability("export first", "llama.cpp hot-loads GGUF adapters, and `edgelora export` writes one")
CHAT_OF_A_PROMPT = Ability("export first", "a GGUF of it is put before prompts, and `edgelora export` writes one")
CHAT_OF_A_PATCH = Ability("export first", "the base that is patched with it answers, and `edgelora export` writes one")
IF_UNTIED = "if that has a head of its own (`edgelora untie` writes one)"
MERGE_IT = "merge it into its base with `edgelora merge`"
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class AdapterFacts:
    """`faults`: why edgelora would refuse it whatever the base."""

    kind: Literal["PEFT adapter", "GGUF adapter"]
    path: str
    size_bytes: int
    method: str
    architecture: str | None
    """llama.cpp's name of the base's family, where the file states it."""
    base: str | None
    """The base as the adapter names it."""
    alpha: float | None
    """0 in a GGUF: every scale is in the tensors already."""
    ranks: dict[int, int]
    """Rank → how many linear layers have it."""
    targets: dict[str, int]
    """Name inside a layer → how many layers."""
    parameters: int
    types: list[TypeShare]
    contract: dict[str, Any] | None
    certificate: dict[str, Any] | None
    faults: list[str]
    export: Ability
    merge: Ability
    chat: Ability


def is_adapter(file: GGUFFile) -> bool:
    """Whether a GGUF is an adapter, by what it says or what is in it."""
    return stated(file, "general.type", str) == "adapter" or any(name.endswith(".lora_a") for name in file.tensors)


def peft_adapter(path: Path) -> AdapterFacts:
    """Raises FileFormatError if its two files cannot be read, AdapterError if its tensors are in a pickle only."""
    refuse_pickle(path)
    config, file = read_json(path / CONFIG), SafetensorsFile(path / TENSORS)
    config = with_whole_vocabulary(config, file.tensors)
    if is_trained_prompt(path):
        return _trained_prompt(path, config, file)
    shapes = {name.removeprefix(PREFIX).removesuffix(".weight"): t.shape for name, t in file.tensors.items()}
    kind = kind_of(config) if isinstance(config, dict) else None
    layers = layers_told(kind, {name: t.shape for name, t in file.tensors.items()})
    layers = replace(layers, linears=_of_a_vera(shapes) or layers.linears)
    contract, faults = None, list[str]()
    try:
        contract = contract_in(path)
        # whether its base has one matrix for both or two, nothing here says
        adapter = read_adapter(path, replace(layers, vocabularies=layers.matrices), may_wait=True)
        export, merge, chat = _doors(adapter, _ability(contract, []))
    except EdgeloraError as e:
        faults.append(reason(e, path))
        export = merge = chat = _ability(contract, faults)
    base = config.get("base_model_name_or_path")
    alpha = config.get("lora_alpha")
    types = shares((t.dtype, t.shape, t.size_bytes) for t in file.tensors.values())
    return AdapterFacts(
        "PEFT adapter", str(path), file.size_bytes, contract.method if contract else _peft_method(config), None,
        contract.base_file.name if contract else str(base) if base else None,
        float(alpha) if isinstance(alpha, int | float) and abs(alpha) < 1e9 else None,
        _ranks(shapes, "lora_A") or _ranks(shapes, "vera_lambda_d"),
        dict(Counter(name.rpartition(".")[2] for name in (*layers.linears, *layers.norms, *layers.vocabularies))),
        sum(share.parameters for share in types), types, contract_facts(contract) if contract else None,
        contract.certificate if contract else None, faults,
        export=export, merge=merge, chat=chat,
    )  # fmt: skip


def _doors(adapter: Adapter, can: Ability) -> tuple[Ability, Ability, Ability]:
    """Export, merge and chat of a sound adapter, as `converters/exit_plan.py` opens its doors once there is a base;
    `can`: what is said where it can be done."""
    if adapter.kind.of_input:
        never = Ability("no", f"{adapter.kind.of_input}: {IN_TORCH}")
        return never, never, never
    if adapter.invocation:
        return can, Ability("no", "it acts from its invocation on, and a weight on every token"), CHAT_OF_A_FOLDER
    apart = adapter.token_rows or any(adapter.change(module).is_pair for module in adapter.vocabularies)
    over = f"{can.why}, {IF_UNTIED}" if apart else can.why
    ways = {_way(module, adapter.change(module)) for module in (*adapter.linears, *adapter.vocabularies)}
    if "merged" in ways:
        never = Ability("no", f"{adapter.kind.one} changes whole weights: {MERGE_IT}")
        return never, can, never
    if "patched" in ways or adapter.norms:
        return Ability("yes", f"as a patched base, {over}"), can, CHAT_OF_A_PATCH
    return Ability("yes", over), can, CHAT_OF_A_FOLDER


def _way(module: str, change: Change) -> Door:
    """How this change of a layer leaves."""
    if change.is_pair:
        return "adapter"
    rewrites = change.whole is not None and not isinstance(change.whole, InPlaceOf)
    return "merged" if rewrites or (change.columns is not None and not module.endswith(DOWN)) else "patched"


def _trained_prompt(path: Path, config: Mapping[str, Any], file: SafetensorsFile) -> AdapterFacts:
    """The facts of prompt tuning, P-tuning or prefix tuning."""
    faults, contract, base = faults_of(config, file), None, config.get("base_model_name_or_path")
    try:
        contract = contract_in(path)
    except AdapterError as e:
        faults.append(reason(e, path))
    types = shares((t.dtype, t.shape, t.size_bytes) for t in file.tensors.values())
    export = _ability(contract, faults)
    return AdapterFacts(
        "PEFT adapter", str(path), file.size_bytes, contract.method if contract else _peft_method(config), None,
        contract.base_file.name if contract else str(base) if base else None, None, {}, {},
        sum(share.parameters for share in types), types, contract_facts(contract) if contract else None,
        contract.certificate if contract else None, faults, export=export,
        merge=Ability("no", "it stands before prompts, and changes no weight"),
        chat=export if faults else CHAT_OF_A_PROMPT,
    )  # fmt: skip


def gguf_adapter(file: GGUFFile) -> AdapterFacts:
    """The facts of an adapter's GGUF, and its faults among them: it raises for none."""
    shapes = {name: info.shape for name, info in file.tensors.items()}
    linears = _linears(shapes, "lora_a", "lora_b")
    faults, contract = [], None
    try:
        if is_soft(file):
            require_sound(file)
        else:
            stacked = {name: shape for name, shape in own_shapes(file).items() if len(shape) > 2}
            check_adapter(file.path, file.architecture, linears | stacked)
        contract = contract_of(file)
    except EdgeloraError as e:
        faults.append(reason(e, file.path))
    types = shares((t.type.name, t.shape, t.size_bytes) for t in file.tensors.values())
    return AdapterFacts(
        "GGUF adapter", str(file.path), file.size_bytes,
        contract.method if contract else stated(file, "adapter.type", str) or "unknown",
        file.architecture or None, contract.base_file.name if contract else None,
        stated(file, "adapter.lora.alpha", float), _ranks(shapes, "lora_a"),
        dict(Counter(name.removesuffix(".weight").rpartition(".")[2] for name in linears)),
        sum(share.parameters for share in types), types, contract_facts(contract) if contract else None,
        certificate_of(file), faults,
        export=Ability("no", "it is exported already"),
        merge=Ability("no", "only the folder that it was exported from can be merged"),
        chat=_ability(contract, faults),
    )  # fmt: skip


def _ability(contract: Contract | None, faults: list[str]) -> Ability:
    """What can be done with an adapter over its base: it is held to that one only once there is a base."""
    if faults:
        return Ability("no", faults[0])
    if contract is None:
        return Ability("yes", "with --allow-unverified-base, over the base it was trained on")
    return Ability("yes", f"over {contract.base_file.name} ({contract.base_file.quant}) or another quantization of it")


def _linears(shapes: Shapes, a: str, b: str) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of the linear layers that these pairs were made for; 0 where no matrix tells it."""
    found: dict[str, tuple[int, int]] = {}
    for name, shape in shapes.items():
        module, _, part = name.rpartition(".")
        if part in (a, b):
            d_out, d_in = found.get(module, (0, 0))
            rows, columns = shape if len(shape) == 2 else (0, 0)
            found[module] = (d_out, columns) if part == a else (rows, d_in)
    return found


def _of_a_vera(shapes: Shapes) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of its layers, as far as its file tells: d_in is that of the widest for all."""
    widest = shapes.get("base_model.vera_A", (0, 0))[-1]
    return {
        name.removesuffix(".vera_lambda_b"): (shape[0] if shape else 0, widest)
        for name, shape in shapes.items() if name.endswith(".vera_lambda_b")
    }  # fmt: skip


def _ranks(shapes: Shapes, a: str) -> dict[int, int]:
    return dict(Counter(shape[-2:][0] for name, shape in shapes.items() if name.endswith(f".{a}") and shape))


def _peft_method(config: Mapping[str, Any]) -> str:
    """`lora`, and what makes it another one."""
    more = [name for name in ("use_rslora", "use_dora") if config.get(name) is True]
    return " + ".join([str(config.get("peft_type", "unknown")).lower(), *(name.removeprefix("use_") for name in more)])
