"""A model whose tensors were measured: what any plan for it will cost, and what a written one did cost."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType

from converters.budget import Choice, least_bytes, least_damage, require_room
from converters.candidates import candidates, probe
from converters.file_size import padded
from converters.imatrix import Importance, read_importance
from converters.plan import Plan, QuantizeOptions, TensorPlan, plan_types
from converters.quant_types import QUANT_TYPES, tensor_bytes
from converters.quantize import write_planned
from converters.repair import require_rank
from edgelora.base.ggml import FLOATS
from edgelora.base.model import FLOAT_QUANTS, Base, open_base
from edgelora.child import run_in_child
from edgelora.errors import ConfigError, OutputError
from edgelora.evaluate.fidelity import Fidelity
from edgelora.evaluate.sensitivity import Cost, Sensitivity, cache_key, predicted
from edgelora.files.atomic import require_space
from edgelora.files.certificate_keys import reserved
from edgelora.files.contract import sha256_file
from edgelora.peft.adapter import Adapter
from edgelora.pipeline.calibration import Calibration, read_calibration
from edgelora.pipeline.held_out import collect, held_out_kl
from edgelora.pipeline.sensitivity import Job, Trial, sensitivities
from edgelora.pipeline.snap_back import notes_on_grid
from edgelora.progress import OnProgress, silent
from edgelora.versions import versions

Type = GGMLQuantizationType

RECIPE = "Q4_K_M"  # any recipe tells which tensors llama.cpp quantizes at all


@dataclass(frozen=True)
class BudgetOptions:
    """What a target is reached with. One of `data` and `text` is what the model will see."""

    data: Path | None = None
    """Rows of conversations, in any format that training reads."""
    text: Path | None = None
    imatrix: Path | None = None
    """Without it, importance is collected on the same tokens."""
    plan_out: Path | None = None
    """Where the plan is kept, to be read, edited and used again."""
    repair_rank: int | None = None
    overwrite: bool = False
    allow_requantize: bool = False


@dataclass(frozen=True)
class Attempt:
    """A plan that was written: what the sum of damages says of it, and what was measured on held-out tokens."""

    file_bytes: int
    predicted_kl: float
    measured: Fidelity


@dataclass(frozen=True)
class Prepared:
    """A source whose tensors were measured: from here a plan for any target costs a fraction of a second."""

    source: Path
    calibration: Calibration
    importance: Importance
    stock: Plan
    """Its types stay for tensors that were not measured."""
    found: Mapping[str, Sensitivity]
    notes: tuple[str, ...] = ()
    """What is to be known about what was measured."""

    @classmethod
    def read(
        cls,
        source: Path,
        options: BudgetOptions,
        on_cost: Callable[[Cost], None] = lambda _: None,
        on_progress: OnProgress = silent,
        *,
        size_bytes: int | None = None,
    ) -> Prepared:
        """Read what to measure on, collect importance unless it is given, and measure every tensor once and for all.

        size_bytes: of the file that will be asked for; what cannot be reached is refused before anything is measured.
        Raises BaseModelError for a checkpoint, OutputError for a source that is quantized already, ConfigError for a
        mixture of experts, a size or a rank that cannot be or nothing to measure on, DataError for too little of it.
        """
        base = open_base(source)
        source = base.file.path
        _refuse(base, options)
        calibration = read_calibration(base, options.data, options.text)
        if options.imatrix is not None:
            importance = read_importance(options.imatrix)
            importance.check({name: info.shape for name, info in base.file.tensors.items()})
        else:
            collected = run_in_child(collect, source, calibration.importance, with_torch=True, on_progress=on_progress)
            importance = replace(collected, datasets=tuple(p.name for p in (options.data, options.text) if p))
        weights = importance.weights()
        stock = plan_types(source, QuantizeOptions(RECIPE, imatrix=weights), _keys())
        job = Job(source, calibration.measured, _trials(stock, weights))
        if size_bytes is not None:
            room = size_bytes - stock.header_bytes - _unmeasured(stock, job.trials)
            require_room([_sizes(t, job.trials[t.name].kinds) for t in stock.tensors if t.name in job.trials], room)
        found = sensitivities(job, _key(base, job), on_cost, on_progress)
        notes = (*_seen(options, importance), *notes_on_grid(base, stock.types))
        return cls(source, calibration, importance, stock, found, notes)

    def choices(self) -> dict[str, list[Choice]]:
        """For each measured tensor its types, with bytes as they lie in a file."""
        found: dict[str, list[Choice]] = {}
        for t in self.stock.tensors:
            if (one := self.found.get(t.name)) is not None:
                kinds = [GGMLQuantizationType[name] for name in one.errors]
                found[t.name] = [Choice(k, padded(tensor_bytes(t.shape, k)), one.damage(k.name)) for k in kinds]
        return found

    def within_bytes(self, size_bytes: int) -> Plan:
        """The plan with the least damage whose file has at most `size_bytes`."""
        choices = self.choices()
        room = size_bytes - self.stock.header_bytes - _unmeasured(self.stock, choices)
        return self._plan(least_damage(choices, room))

    def within_damage(self, damage: float) -> Plan:
        """The smallest plan whose damages add up to at most `damage`."""
        return self._plan(least_bytes(self.choices(), damage))

    def damages(self) -> tuple[float, float]:
        """What the damages of a plan add up to at least and at most."""
        given = [[choice.damage for choice in found] for found in self.choices().values()]
        return sum(map(min, given)), sum(map(max, given))

    def damage(self, plan: Plan) -> float:
        """The KL of `plan`, if damages add up."""
        return predicted(self.found, {name: kind.name for name, kind in plan.types.items()})

    def attempt(self, plan: Plan, draft: Path, on_progress: OnProgress) -> Attempt:
        """Write `plan` to `draft` and measure it."""
        require_space(draft.parent, plan.file_bytes, "the quantized weights")
        write_planned(self.source, draft, plan, self.importance.weights(), on_progress, _keys())
        return Attempt(draft.stat().st_size, self.damage(plan), self.measured(draft, None, on_progress))

    def measured(self, written: Path, adapter: Adapter | None, on_progress: OnProgress) -> Fidelity:
        """torch over `written` against torch over the source, on the tokens that were held out."""
        windows = self.calibration.held_out
        return run_in_child(
            held_out_kl, self.source, written, adapter, windows, with_torch=True, on_progress=on_progress
        )

    def _plan(self, taken: Mapping[str, Choice]) -> Plan:
        types = {name: choice.type for name, choice in taken.items()}
        plan = self.stock.with_types(types)
        weights: Counter[Type] = Counter()
        for t in plan.tensors:
            weights[t.type] += int(np.prod(t.shape))
        # what the file says it is: the recipe of the type that most of its weights have and that has one
        named = (kind.name for kind, _ in weights.most_common() if kind.name in QUANT_TYPES)
        return replace(plan, kind=next(named, plan.kind))


def _refuse(base: Base, options: BudgetOptions) -> None:
    if base.quant not in FLOAT_QUANTS and not options.allow_requantize:
        raise OutputError(
            what=f"{base.path} is {base.quant} already",
            why="quantizing twice adds the errors of both",
            fix="start from the F16 file, or pass --allow-requantize",
        )
    if base.architecture.experts is not None:
        raise ConfigError(
            what=f"{base.path}: a mixture of experts has no measured sensitivities",
            why="a few thousand tokens reach few of its experts often enough",
            fix="pass a TYPE and --imatrix instead of a target",
        )
    if options.repair_rank is not None:
        for shape in base.linears.values():
            require_rank(options.repair_rank, shape)
        if base.template_source is None:
            raise ConfigError(
                what=f"--repair, and {base.path} has no chat template",
                why="a repair is checked in llama.cpp on conversations, as every adapter is",
                fix="leave --repair out",
            )


def _seen(options: BudgetOptions, importance: Importance) -> tuple[str, ...]:
    """What is to be said where the importance matrix has seen what is held out."""
    measured_on = options.data or options.text
    if options.imatrix is None or measured_on is None:
        return ()
    if measured_on.name not in {Path(name).name for name in importance.datasets}:
        return ()
    return (
        f"{options.imatrix.name} was computed on {measured_on.name} too: the KL is measured on tokens that chose the "
        "bits, and is a little lower than on others; leave --imatrix out, or measure on other rows",
    )


def _unmeasured(stock: Plan, measured: Mapping[str, object]) -> int:
    """The bytes in a file of the tensors whose types stay."""
    return sum(padded(t.size_bytes) for t in stock.tensors if t.name not in measured)


def _sizes(tensor: TensorPlan, kinds: Sequence[Type]) -> list[int]:
    return [padded(tensor_bytes(tensor.shape, kind)) for kind in kinds]


def _keys() -> dict[str, str | float]:
    """Metadata to add to the file."""
    return {"general.quantized_by": f"edgelora {versions()['edgelora']}", **reserved()}


def _trials(stock: Plan, importance: Mapping[str, np.ndarray]) -> dict[str, Trial]:
    """What to try of every tensor that llama.cpp would quantize."""
    trials = {}
    for t in stock.tensors:
        if t.type not in FLOATS and len(t.shape) == 2:
            own = importance.get(t.name)
            trials[t.name] = Trial(probe(t.shape[-1]), candidates(t.name, t.shape[-1], own is not None), own)
    return trials


def _key(base: Base, job: Job) -> str:
    digest = hashlib.sha256()
    for name, trial in sorted(job.trials.items()):
        digest.update(f"{name} {trial.probe.name} {[kind.name for kind in trial.kinds]}".encode())
        digest.update(b"" if trial.importance is None else np.ascontiguousarray(trial.importance).tobytes())
    for array in (job.windows.ids, job.windows.scored):
        digest.update(np.ascontiguousarray(array).tobytes())
    return cache_key(source=sha256_file(base.path), asked=digest.hexdigest())
