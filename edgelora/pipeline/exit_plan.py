"""`export --plan`: the door that an adapter would leave by over a base, before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

from converters.exit_facts import facts_of_adapter, facts_of_base, facts_of_prompt
from converters.exit_plan import Door, ExitPlan, Way, plan_exit
from converters.exit_words import LAYERED, NEAREST, UNTIED
from converters.pair_types import pair_type
from converters.patch import plan_patch
from converters.quant_types import QUANT_TYPES
from edgelora.base.model import Base, open_base
from edgelora.errors import ExportError
from edgelora.evaluate.studied import advice
from edgelora.peft.adapter import Adapter
from edgelora.peft.first_ranks import is_nested, ranks_of
from edgelora.peft.soft_prompt import is_trained_prompt
from edgelora.pipeline.export import read_checked, read_checked_prompt
from edgelora.words import size


def plan(
    base_path: Path, adapter_path: Path, dtype: str = "F16", *, allow_unverified: bool = False, measure: bool = False
) -> ExitPlan:
    """Which door the adapter leaves by. `dtype`: of a LoRA's numbers.

    measure: whether the rounding of a patched base is measured, which reads every weight that is scaled, not bounded.
    Raises what `export` does for a base or an adapter that cannot be read, or do not belong together.
    """
    dtype, base = pair_type(dtype).name, open_base(base_path)
    if is_trained_prompt(adapter_path):
        prompt = read_checked_prompt(adapter_path, base, allow_unverified=allow_unverified)
        return plan_exit(facts_of_prompt(prompt), facts_of_base(base), dtype)
    adapter = read_checked(adapter_path, base, allow_unverified=allow_unverified, may_wait=True, with_rows=True)
    facts = facts_of_adapter(adapter, base)
    found = plan_exit(facts, facts_of_base(base), dtype)
    if measure and found.door == "patched":
        patch = plan_patch(base, adapter)
        kinds = {name: one.kind for name, one in patch.patches.items()}
        found = plan_exit(replace(facts, becomes=kinds, moved=patch.error), facts_of_base(base), dtype)
        measured = [f"measured: {rounded(patch.error)}"] if patch.patches else []
        found = replace(found, notes=(*found.notes, *patch.notes, *measured))
    return replace(found, notes=(*found.notes, *_of_ranks(adapter), *_advised(adapter, base)))


def own_type(base_path: Path) -> str:
    """What a merge of this base is written as where nobody says: its own type, where llama.cpp has a name for it."""
    quant = open_base(base_path).quant
    return quant if quant in QUANT_TYPES else "F16"


def through(found: ExitPlan, asked: str | None, adapter_path: Path) -> Way:
    """The way by this door; without one the planned, where it is exact. Raises ExportError if there is none."""
    if asked is None:
        if found.door in found.open and found.exact:
            return found.open[found.door]
        raise _not_exact(found, adapter_path) if found.open else _refused(found, adapter_path)
    door = cast(Door, asked)
    if door in found.open:
        return found.open[door]
    if not found.open:
        raise _refused(found, adapter_path)
    why, near, _ = found.others[door].partition(f"; {NEAREST}")
    fix = f"leave --door out: it leaves as {found.door}" if found.exact else f"pass --door {found.door}"
    raise ExportError(
        what=f"{adapter_path}: it cannot leave as {door}",
        why=why,
        fix=f"{fix}; or in its place {NEAREST}" if near else fix,
    )


def rounded(error: float) -> str:
    """What patching did to weights, in words."""
    if not error:
        return "rounding moves no weight"
    return f"in no tensor do weights move by more than {error:.2g} of their size (root mean square)"


def in_words(found: ExitPlan) -> Iterator[str]:
    """The plan, in lines for people."""
    yield from taken_in_words(found)
    for door, why in found.others.items():
        if why not in (found.why, LAYERED):  # said already, or of every adapter
            yield f"not as {door}: {why}" if not why.startswith("open too") else f"{door}, {why}"


def taken_in_words(way: Way | ExitPlan) -> Iterator[str]:
    """The door, why, size, error, whether it comes and goes, and what else is to be known of it."""
    yield f"{way.door}: {way.why}"
    if way.door != "refused":
        error = way.expected_error
        if error is None:
            rounding = "what it costs is measured once it is written"
        else:
            rounding = (
                f"rounding moves what is stored by at most {error:.2g} of its size" if error else "nothing is rounded"
            )
        stays = "comes and goes over a loaded base" if way.hot_swappable else "is loaded as a model"
        yield f"{size(way.size_bytes)}, {rounding}, {stays}"
    yield from way.notes


def _of_ranks(adapter: Adapter) -> Iterator[str]:
    """Of a DyLoRA that these are the first of its ranks, or that fewer of them can be had."""
    if adapter.contract is None or not is_nested(adapter.contract):
        return
    ranks, trained = ranks_of(adapter), adapter.contract.training.get("rank")
    if isinstance(trained, int) and trained > ranks:
        yield f"rank {ranks}, the first of the {trained} that were trained, as they learned to be used: it is exact"
    elif ranks > 1:
        yield f"--rank R takes its first R ranks alone, of {ranks}: a DyLoRA is as exact with any number of them"


def _advised(adapter: Adapter, base: Base) -> Iterator[str]:
    """What the study of ways (docs/which-way.md) says of this level, for what was trained over another."""
    elsewhere = adapter.contract is not None and adapter.contract.base_file.quant != base.quant
    said = advice(base.quant, ()) if elsewhere else None
    if said is not None:
        yield said


def _refused(found: ExitPlan, adapter_path: Path) -> ExportError:
    return ExportError(f"{adapter_path}: no door leads to llama.cpp", found.why, "; ".join(found.notes))


def _not_exact(found: ExitPlan, adapter_path: Path) -> ExportError:
    larger = "--door merged --type F16 for one that rounds once and is larger, " if found.door == "merged" else ""
    taken = f"pass --door {found.door} to take it as it is, {larger}or look at --plan for the others"
    return ExportError(
        what=f"{adapter_path}: no exact way leads to llama.cpp over this base",
        why=found.why,
        fix=f"{UNTIED}; or {taken}" if UNTIED in found.notes else taken,
    )
