"""Several adapters over one base → one adapter folder, and what they do to each other: per layer and on tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from converters.adapter_from_peft import with_tied_head
from converters.compose import HOWS, Part, Recipe, compose, n_layers
from converters.interference import LayerInterference, interference
from edgelora.base.model import Base, open_base
from edgelora.errors import AdapterError, ConfigError
from edgelora.files.contract import Contract, sha256_file
from edgelora.files.unchanged import stamp
from edgelora.peft.adapter import TENSORS, Adapter, refuse_to_write, write_adapter
from edgelora.peft.lora_config import StoredPair, adapter_of
from edgelora.pipeline.export import read_checked
from edgelora.pipeline.task_scores import Task, TaskScore, require_scorable, task_scores
from edgelora.progress import OnProgress, Pace, Progress, silent
from edgelora.versions import versions

__all__ = ["HOWS", "ComposeOptions", "Composition", "Recipe", "compose_adapters"]

METHOD = "compose"
COMPOSED = "composed"


@dataclass(frozen=True)
class ComposeOptions:
    """What is made, and what is measured of it."""

    recipe: Recipe = field(default_factory=Recipe)
    report: bool = False
    """Whether to measure how the adapters meet in each layer."""
    tasks: Sequence[Task] = ()
    """What base, adapters and their composition are scored on, in llama.cpp."""
    allow_unverified: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Composition:
    """What was written, and what was measured. `lost`: the share of the composed ΔW, by its Frobenius norm, that its
    rank left out; None where nothing was cut."""

    out: Path
    size_bytes: int
    ranks: dict[int, int]
    """Rank → how many layers have it."""
    lost: float | None
    notes: list[str]
    layers: list[LayerInterference]
    scores: list[TaskScore]

    def as_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out), "size_bytes": self.size_bytes, "ranks": self.ranks, "lost": self.lost,
            "notes": self.notes, "interference": [layer.as_dict() for layer in self.layers],
            "scores": [asdict(score) for score in self.scores],
        }  # fmt: skip


def compose_adapters(
    base_path: Path,
    adapters: Sequence[tuple[Path, float]],
    out: Path,
    options: ComposeOptions,
    on_progress: OnProgress = silent,
) -> Composition:
    """Compose adapter folders at their weights and write the folder `out`: a plain LoRA for every other command.

    Raises ConfigError or AdapterError for what cannot be composed, before anything is written.
    """
    if not adapters:
        raise ConfigError("nothing to compose", "no adapter was named", "pass --adapter FOLDER[:WEIGHT]")
    if nothing := [path for path, weight in adapters if not weight]:
        raise ConfigError(
            what=f"--adapter {nothing[0]}:0: nothing of it would be in the result",
            why="a weight multiplies what an adapter changes",
            fix="leave it out, or give it another weight",
        )
    refuse_to_write(out, options.overwrite)
    made_from = stamp(base_path, *(path for path, _ in adapters))
    made_from.require_apart(out)
    base, parts = _open(base_path, adapters, options)
    if options.tasks:
        require_scorable(base, options.tasks)
    adapter, ranks, lost = _composed(base, parts, options.recipe, on_progress)
    contract = _contract(base, parts, [path for path, _ in adapters], options.recipe)
    made_from.require_unchanged()
    write_adapter(out, Adapter(adapter.config, adapter.tensors, contract), overwrite=options.overwrite)
    composed = Part(Adapter(adapter.config, adapter.tensors, contract), 1.0, COMPOSED)
    return Composition(
        out=out,
        size_bytes=sum(file.stat().st_size for file in out.iterdir()),
        ranks=dict(ranks),
        lost=lost,
        notes=_notes(parts, options, contract),
        layers=_layers(base, parts, composed, on_progress) if options.report else [],
        scores=task_scores(base, [*parts, composed], options.tasks, on_progress) if options.tasks else [],
    )


def _open(base_path: Path, adapters: Sequence[tuple[Path, float]], options: ComposeOptions) -> tuple[Base, list[Part]]:
    """The base, with the template that its adapters were trained with, and the adapters, held to their contracts."""
    base = open_base(base_path)
    names = [path.resolve().name for path, _ in adapters]
    if len({*names, COMPOSED}) <= len(names):
        names = [str(path) for path, _ in adapters]
    if repeated := [name for name, n in Counter(names).items() if n > 1]:
        raise ConfigError(
            what=f"--adapter {repeated[0]}: named twice",
            why="its changes are the same, and their sum is one of them at another weight",
            fix=f"name it once, such as {repeated[0]}:2",
        )
    parts = [
        # more than can be composed is read, so that what is refused is named
        Part(
            read_checked(path, base, allow_unverified=options.allow_unverified, may_wait=True, with_rows=True),
            weight,
            name,
        )
        for (path, weight), name in zip(adapters, names, strict=True)
    ]
    for part in parts:
        base = base.as_trained(part.adapter.contract)
    said = {p.name: p.adapter.contract.chat_template_sha256 for p in parts if p.adapter.contract is not None}
    if len(set(said.values())) > 1:
        raise AdapterError(
            what=f"{' and '.join(said)}: they were trained with other chat templates",
            why="one adapter has one template, and these expect conversations written otherwise",
            fix="train them with the same --chat-template",
        )
    return base, parts


def _composed(
    base: Base, parts: Sequence[Part], recipe: Recipe, on_progress: OnProgress
) -> tuple[Adapter, Counter[int], float | None]:
    """The adapter, how many layers have each rank, and the share of ΔW that this left out."""
    pairs: dict[str, StoredPair] = {}
    lost = whole = 0.0
    pace = Pace(n_layers(parts))
    for module, found in compose(parts, recipe, {**base.linears, **base.vocabularies}):
        pairs[module] = StoredPair(found.pair.a, found.pair.b, alpha=found.pair.rank)  # α/r = 1
        lost, whole = lost + found.lost, whole + found.whole
        _, eta = pace.step(0)
        on_progress(Progress("compose", pace.done, pace.total, eta_s=eta))
    adapter = with_tied_head(adapter_of(pairs, base.linears, str(base.path)), base)
    return adapter, Counter(pair.rank for pair in pairs.values()), (lost / whole) ** 0.5 if lost else None


def _layers(base: Base, parts: Sequence[Part], composed: Part, on_progress: OnProgress) -> list[LayerInterference]:
    pace, layers = Pace(n_layers(parts)), []
    for layer in interference(parts, composed, base):
        layers.append(layer)
        _, eta = pace.step(0)
        on_progress(Progress("interference", pace.done, pace.total, eta_s=eta))
    return layers


def _contract(base: Base, parts: Sequence[Part], paths: Sequence[Path], recipe: Recipe) -> Contract | None:
    """Of the result: None, as for one made elsewhere, where one of the adapters does not say its base."""
    theirs = [part.adapter.contract for part in parts]
    contracts = [contract for contract in theirs if contract is not None]
    if len(contracts) < len(theirs):
        return None
    files = {contract.base_file.sha256: contract.base_file for contract in contracts}
    systems = {contract.system for contract in contracts}
    made_from = [
        {"name": part.name, "sha256": sha256_file(path / TENSORS), "weight": part.weight, "method": contract.method}
        for part, path, contract in zip(parts, paths, contracts, strict=True)
    ]
    return contracts[0].model_copy(
        update={
            "version": versions()["edgelora"],
            "base": base.fingerprint,
            # the quantization that it was trained over, where that is one
            "base_file": contracts[0].base_file if len(files) == 1 else base.base_file,
            "system": systems.pop() if len(systems) == 1 else None,
            "single_turn": all(contract.single_turn for contract in contracts),
            "method": METHOD,
            "training": {"recipe": asdict(recipe), "made_from": made_from},
            "evaluation": {},
            "versions": versions(),
            "certificate": None,
        }
    )


def _notes(parts: Sequence[Part], options: ComposeOptions, contract: Contract | None) -> list[str]:
    """What its user should know."""
    notes = []
    if contract is None:
        notes.append("it does not say its base either: pass --allow-unverified-base wherever it is used")
    systems = {part.adapter.contract.system for part in parts if part.adapter.contract is not None}
    if len(systems) > 1:
        notes.append("the adapters were trained with different system messages; chat says none by itself")
    counts = Counter(module for part in parts for module in part.adapter.tensors)
    if len(parts) > 1 and max(counts.values()) == 1:
        notes.append("the adapters have no layer in common: in no layer do they meet")
    if options.recipe.way.factors and len(parts) > 1:
        notes.append(f"{options.recipe.how} multiplies B of one adapter by A of another too; sum and ties do not")
    return notes
