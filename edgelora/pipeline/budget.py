"""A model → the best GGUF of a size, or the smallest within a KL: measured, planned, written, and measured again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGMLQuantizationType as Type

from converters.imatrix import write_importance
from converters.plan import Plan, write_plan
from edgelora.errors import ConfigError
from edgelora.evaluate.sensitivity import Cost
from edgelora.files.atomic import refuse_existing, staged
from edgelora.pipeline.certificate import (
    ModelCertificate,
    Output,
    Reference,
    beside,
    certify_model,
    stamp,
    write_certified,
)
from edgelora.pipeline.prepared import Attempt, BudgetOptions, Prepared
from edgelora.pipeline.repair import Repair, repair_beside, repair_path
from edgelora.progress import OnProgress, silent

__all__ = ["Attempt", "BudgetOptions", "Reached", "Target", "quantize_to"]

MISS = 0.10  # below a KL target: what is further off goes to the next plan
PLANS = 6  # written and measured at most for a KL target
NARROW = 1.01  # limits of the sum of damages that are nearer to each other have no plan of note between them
STEP = 16.0  # the most that one measurement moves such a limit by: a KL of 0 would move it without end
ROUNDING = 1e-9  # a limit that is met exactly leaves room for sums in another order


@dataclass(frozen=True)
class Target:
    """One of the two: the bytes of the whole file, or the mean KL (nats) to the source on held-out tokens."""

    size_bytes: int | None = None
    kl: float | None = None

    def __post_init__(self) -> None:
        if (self.size_bytes is None) == (self.kl is None):
            raise ConfigError(
                what="a size and a KL" if self.kl is not None else "neither a size nor a KL",
                why="one decides the other",
                fix="pass one of --target-size 90MB and --target-kl 0.02",
            )
        if not 0 < (self.size_bytes or self.kl or 0) < float("inf"):
            raise ConfigError(f"a target of {self.size_bytes or self.kl}", "it is a number above 0", "ask for more")


@dataclass(frozen=True)
class Reached:
    """The file that was written. `attempts`: every plan that was tried, in that order; `taken`: the one that stands."""

    path: Path
    size_bytes: int
    plan: Plan
    taken: Attempt
    attempts: tuple[Attempt, ...]
    notes: tuple[str, ...]
    certificate: ModelCertificate
    repair: Repair | None = None

    @property
    def kl(self) -> float:
        """Mean, on held-out tokens, of torch over the written file against torch over the source."""
        return self.taken.measured.kl_mean

    def as_dict(self) -> dict[str, Any]:
        tried = [{**asdict(a), "measured": a.measured.as_dict()} for a in self.attempts]
        return {
            "out": str(self.path), "size_bytes": self.size_bytes, "kl": self.kl, "attempts": tried,
            "types": dict(Counter(kind.name for kind in self.plan.types.values())), "notes": list(self.notes),
            "certificate": self.certificate.as_dict(),
            "repair": None if self.repair is None else self.repair.as_dict(),
        }  # fmt: skip


def quantize_to(
    source: Path,
    out: Path,
    target: Target,
    options: BudgetOptions,
    on_cost: Callable[[Cost], None] = lambda _: None,
    on_progress: OnProgress = silent,
) -> Reached:
    """Write `out`, the best file that keeps to `target`, and say how far its output is from the source's.

    `on_cost` hears what measuring the sensitivities will take before it starts (nothing if they were measured before).
    Raises ConfigError for a target out of reach, DataError for too little to measure on.
    """
    for path in _written(out, options):
        refuse_existing(path, options.overwrite)
    made_from = stamp(source, *(path for path in (options.data, options.text, options.imatrix) if path is not None))
    made_from.require_apart(*_written(out, options))
    prepared = Prepared.read(source, options, on_cost, on_progress, size_bytes=target.size_bytes)
    tried: list[tuple[Plan, Attempt]] = []
    certificate = write_certified(
        Output(out, options.overwrite),
        made_from,
        lambda draft: tried.extend(reach(prepared, target, draft, on_progress)),
        lambda draft: certify_model(draft, Reference(source), None, on_progress),
    )
    plan, taken = tried[-1] if target.kl is None else min(tried, key=lambda one: _rank(target.kl or 0, one[1]))
    attempts = tuple(attempt for _, attempt in tried)
    if options.plan_out is not None:
        write_plan(options.plan_out, plan, overwrite=options.overwrite)
        if options.imatrix is None:  # types of few bits cannot be written again without it
            with staged(importance_path(options.plan_out), overwrite=options.overwrite) as place:
                write_importance(place, prepared.importance)
    repair = None if options.repair_rank is None else repair_beside(prepared, out, taken, options, on_progress)
    notes = (*prepared.notes, *_missed(target, taken, attempts))
    return Reached(out, out.stat().st_size, plan, taken, attempts, notes, certificate, repair)


def reach(prepared: Prepared, target: Target, draft: Path, on_progress: OnProgress) -> Iterator[tuple[Plan, Attempt]]:
    """Write plans until one is what was asked for, or nothing is left to try; the best of them stays at `draft`.

    The measured KL is not the sum of damages that a plan is chosen by, but grows with it: the limit of that sum moves
    by how far the measurement was off, until it is known on both sides of the target, and is then halved in between.
    """
    if target.size_bytes is not None:
        plan = prepared.within_bytes(target.size_bytes)
        yield plan, prepared.attempt(plan, draft, on_progress)
        return
    assert target.kl is not None
    known: dict[tuple[Type, ...], Attempt] = {}
    best: Attempt | None = None
    limits = _Limits(target.kl, *prepared.damages())
    limit: float | None = target.kl
    while limit is not None:
        plan = prepared.within_damage(limit)
        kinds = tuple(plan.types.values())
        if kinds not in known:
            if len(known) == PLANS:
                return
            trial = draft.with_name(f"trial-{draft.name}")
            known[kinds] = found = prepared.attempt(plan, trial, on_progress)
            if best is None or _rank(target.kl, found) < _rank(target.kl, best):
                best = found
                trial.replace(draft)
            else:
                trial.unlink()
            yield plan, found
        limit = limits.after(limit, known[kinds].measured.kl_mean)


@dataclass
class _Limits:
    """Of the sum of damages, for a KL `target`: which to try next, and the nearest known on both sides.

    `least`, `most`: what damages can add up to. A plan that comes twice narrows this without being measured again.
    """

    target: float
    least: float
    most: float
    within: float = 0.0
    beyond: float = float("inf")

    def after(self, limit: float, kl: float) -> float | None:
        """The next limit, after `limit` gave a file with this KL. None: that is what was asked for, or the nearest."""
        if _is_near(self.target, kl):
            return None
        if kl <= self.target:
            self.within = limit
        else:
            self.beyond = limit
        if self.within > 0 and self.beyond < float("inf"):
            return (self.within * self.beyond) ** 0.5 if self.beyond > self.within * NARROW else None
        factor = (1 - MISS / 2) * self.target / kl if kl > 0 else STEP
        wanted = limit * min(max(factor, 1 / STEP), STEP)
        wanted = min(max(wanted, self.least * (1 + ROUNDING)), self.most)
        moved = wanted > limit if kl <= self.target else wanted < limit
        return wanted if moved else None  # no plan is smaller, or none is better


def _is_near(target: float, kl: float) -> bool:
    return (1 - MISS) * target <= kl <= target


def _rank(target: float, attempt: Attempt) -> tuple[bool, float]:
    """Less is better: the smallest file within the target, and where there is none the nearest to it."""
    kl = attempt.measured.kl_mean
    return kl > target, kl if kl > target else attempt.file_bytes


def _written(out: Path, options: BudgetOptions) -> list[Path]:
    """Everything that may come to be."""
    files = [out]
    if options.plan_out is not None:
        files += [options.plan_out, *([importance_path(options.plan_out)] if options.imatrix is None else [])]
    return files + ([] if options.repair_rank is None else [repair_path(out), beside(repair_path(out))])


def _missed(target: Target, taken: Attempt, attempts: Sequence[Attempt]) -> tuple[str, ...]:
    kl = taken.measured.kl_mean
    if target.kl is None or _is_near(target.kl, kl):
        return ()
    tried = f"{len(attempts)} plans were measured" if len(attempts) > 1 else "one plan was measured"
    if kl > target.kl:
        return (f"{tried}, and none keeps to a KL of {target.kl:g}: the nearest stands, of {kl:.3g}",)
    return (f"{tried}, and none comes within {MISS:.0%} of a KL of {target.kl:g}: the smallest below it stands",)


def importance_path(plan_out: Path) -> Path:
    """Where importance that was collected for a plan stands."""
    return plan_out.with_name(f"{plan_out.stem}.imatrix.gguf")
