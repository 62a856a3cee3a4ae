"""A model → the best GGUF of a size, or the smallest within a KL: measured, planned, written, and measured again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from converters.imatrix import write_importance
from converters.plan import Plan, write_plan
from edgelora.errors import ConfigError
from edgelora.evaluate.sensitivity import Cost
from edgelora.files.atomic import refuse_existing, staged
from edgelora.pipeline.certificate import ModelCertificate, Output, Reference, certify_model, stamp, write_certified
from edgelora.pipeline.prepared import Attempt, BudgetOptions, Prepared
from edgelora.pipeline.repair import Repair, repair_beside, repair_path
from edgelora.progress import OnProgress, silent

__all__ = ["Attempt", "BudgetOptions", "Reached", "Target", "quantize_to"]

MISS = 0.10  # of a KL target: what is further off goes to the next plan
PLANS = 6  # tried for a KL target; each corrects the sum of damages by what was measured


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
    """The file that was written. `attempts`: every plan that was tried, the last one stands."""

    path: Path
    size_bytes: int
    plan: Plan
    attempts: tuple[Attempt, ...]
    notes: tuple[str, ...]
    certificate: ModelCertificate
    repair: Repair | None = None

    @property
    def kl(self) -> float:
        """Mean, on held-out tokens, of torch over the written file against torch over the source."""
        return self.attempts[-1].measured.kl_mean

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
    made_from = stamp(source)
    prepared = Prepared.read(source, options, on_cost, on_progress)
    tried: list[tuple[Plan, Attempt]] = []
    certificate = write_certified(
        Output(out, options.overwrite),
        made_from,
        lambda draft: tried.extend(_reach(prepared, target, draft, on_progress)),
        lambda draft: certify_model(draft, Reference(source), None, on_progress),
    )
    plan, last = tried[-1]
    if options.plan_out is not None:
        write_plan(options.plan_out, plan, overwrite=options.overwrite)
        if options.imatrix is None:  # types of few bits cannot be written again without it
            with staged(importance_path(options.plan_out), overwrite=options.overwrite) as place:
                write_importance(place, prepared.importance)
    repair = None if options.repair_rank is None else repair_beside(prepared, out, last, options, on_progress)
    notes = _missed(target, [attempt for _, attempt in tried])
    return Reached(out, out.stat().st_size, plan, tuple(a for _, a in tried), notes, certificate, repair)


def _reach(prepared: Prepared, target: Target, draft: Path, on_progress: OnProgress) -> Iterator[tuple[Plan, Attempt]]:
    """Write plans to `draft` until one is what was asked for, or PLANS were tried; the last one stays there."""
    if target.size_bytes is not None:
        plan = prepared.within_bytes(target.size_bytes)
        yield plan, prepared.attempt(plan, draft, on_progress)
        return
    assert target.kl is not None
    limit = target.kl
    for _ in range(PLANS):
        plan = prepared.within_damage(limit)
        attempt = prepared.attempt(plan, draft, on_progress)
        yield plan, attempt
        off = attempt.measured.kl_mean / target.kl
        if abs(off - 1) <= MISS:
            return
        limit /= off


def _written(out: Path, options: BudgetOptions) -> list[Path]:
    """Everything that may come to be."""
    files = [out]
    if options.plan_out is not None:
        files += [options.plan_out, *([importance_path(options.plan_out)] if options.imatrix is None else [])]
    return files + ([] if options.repair_rank is None else [repair_path(out)])


def _missed(target: Target, attempts: Sequence[Attempt]) -> tuple[str, ...]:
    if target.kl is None or abs(attempts[-1].measured.kl_mean / target.kl - 1) <= MISS:
        return ()
    return (f"no plan of {len(attempts)} came within {MISS:.0%} of a KL of {target.kl:g}; the last one stands",)


def importance_path(plan_out: Path) -> Path:
    """Where importance that was collected for a plan stands."""
    return plan_out.with_name(f"{plan_out.stem}.imatrix.gguf")
