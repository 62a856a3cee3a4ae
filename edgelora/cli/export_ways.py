"""The ways on which `edgelora export` lets an adapter leave: each is taken, and said in a line or two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora.words import size

if TYPE_CHECKING:
    from edgelora.cli.display import Listener
    from edgelora.pipeline.export import ExportOptions
    from edgelora.progress import OnProgress, Progress


class Door(StrEnum):
    """How an adapter leaves."""

    adapter = "adapter"
    patched = "patched"
    soft_prompt = "soft-prompt"
    merged = "merged"


@dataclass(frozen=True)
class Asked:
    """What the command was given, for whichever door."""

    base: Path
    adapter: Path
    out: Path
    dtype: str | None
    """As it was given; the options have the default."""
    for_: str | None
    options: ExportOptions


def by_door(asked: Asked, door: Door | None, display: Listener) -> dict[str, Any]:
    """Through this door; without one through the planned."""
    from edgelora.errors import ConfigError
    from edgelora.pipeline.exit_plan import plan, taken_in_words, through

    dtype = "F16" if door is Door.merged or asked.dtype is None else asked.dtype
    found = plan(asked.base, asked.adapter, dtype, allow_unverified=asked.options.allow_unverified)
    way = through(found, None if door is None else door.value.replace("-", " "), asked.adapter)
    if way.door == "soft prompt" and asked.dtype is not None:
        raise ConfigError(f"--type {asked.dtype} of a soft prompt", "its numbers are F32, and few", "leave it out")
    told = list(taken_in_words(found if way.door == found.door else way))
    if way.door == "merged" and asked.dtype is not None:
        told[1:2] = []  # its size and error are those of the base's own type
    return {"door": way.door, **WAYS[way.door](asked, display, _saying(told, display))}


def as_plain_lora(asked: Asked, display: Listener) -> dict[str, Any]:
    """A folder of PEFT's, which runs nowhere in llama.cpp."""
    from edgelora.errors import ConfigError
    from edgelora.pipeline.import_adapter import export_as_lora

    if asked.for_ is not None or asked.options.data is not None or asked.dtype is not None:
        raise ConfigError(
            what="--as-lora with --for, --data or --type",
            why="PEFT's files run nowhere in llama.cpp, and keep their numbers",
            fix="leave them out",
        )
    options = asked.options
    made = export_as_lora(
        asked.base, asked.adapter, asked.out, allow_unverified=options.allow_unverified, overwrite=options.overwrite
    )
    display.say(f"{asked.out}: a LoRA on {made.layers} layers, rank {', '.join(map(str, made.ranks))}")
    for note in made.notes:
        display.note(note)
    return made.as_dict()


def nearest_lora(asked: Asked, rank: int, display: Listener) -> dict[str, Any]:
    """A GGUF LoRA of this rank, and what it loses."""
    from edgelora.invocation import command
    from edgelora.pipeline.svd_export import SvdOptions, export_svd

    _require_no_runner(asked, "--svd-rank")
    out = asked.out
    found = export_svd(asked.base, asked.adapter, out, SvdOptions(rank, asked.options), display.show)
    display.say(f"{out}: the nearest LoRA of rank {found.rank}, {_size(out)}")
    display.note(found.sentence)
    display.say("next: " + command("chat", asked.base, "--adapter", str(out)))
    certificate = {**found.as_dict(), "svd_errors": found.errors}
    return {"door": "adapter", "out": str(out), "size_bytes": out.stat().st_size, "certificate": certificate}


def _adapter(asked: Asked, display: Listener, show: OnProgress) -> dict[str, Any]:
    """A GGUF LoRA, or a soft prompt."""
    from edgelora.invocation import command
    from edgelora.pipeline.certificate import Reference
    from edgelora.pipeline.export import export as run
    from edgelora.pipeline.runners import prepare_for

    out, reference = asked.out, Reference(asked.base, ((asked.adapter, 1.0),))
    delivery = prepare_for(asked.for_, reference, out, live=True, overwrite=asked.options.overwrite)
    found = run(asked.base, asked.adapter, out, asked.options, show)
    display.say(
        f"{out}: {_size(out)}, checked on {found.n_prompts} prompts: mean KL "
        f"{found.adapter.kl_mean:.2g} (limit {found.kl_limit:.2g}), same top {found.adapter.same_top:.1%}"
    )
    if delivery is not None:
        delivery.write()
        for note in delivery.notes:
            display.say(note)
    display.say("next: " + (delivery.command if delivery else command("chat", asked.base, "--adapter", str(out))))
    made = {"out": str(out), "size_bytes": out.stat().st_size, "certificate": found.as_dict()}
    return made | ({"for": delivery.as_dict()} if delivery else {})


def _patched(asked: Asked, display: Listener, show: OnProgress) -> dict[str, Any]:
    from edgelora.invocation import command
    from edgelora.pipeline.exit_plan import rounded
    from edgelora.pipeline.patch import patch

    _require_no_runner(asked, "--door patched")
    out = asked.out
    made = patch(asked.base, asked.adapter, out, asked.options, show)
    found = made.certificate
    rest = f", and {made.rest}, {_size(made.rest)}, which belongs over it" if made.rest else ""
    display.say(
        f"{out}: {_size(out)}{rest}: {rounded(made.error)}; "
        f"checked on {found.n_prompts} prompts: mean KL {found.adapter.kl_mean:.2g} (limit {found.kl_limit:.2g}), "
        f"same top {found.adapter.same_top:.1%}"
    )
    for note in made.notes:
        display.say(note)
    display.say("next: " + command("chat", out, *(["--adapter", str(made.rest)] if made.rest else [])))
    return made.as_dict()


def _merged(asked: Asked, display: Listener, show: OnProgress) -> dict[str, Any]:
    from edgelora.invocation import command
    from edgelora.pipeline.exit_plan import own_type
    from edgelora.pipeline.merge import MergeOptions, merge

    _require_no_runner(asked, "--door merged")
    options = asked.options
    made = merge(
        asked.base, [(asked.adapter, 1.0)], asked.out, quant=asked.dtype or own_type(asked.base),
        options=MergeOptions(check=options.data, check_rows=options.n_rows),
        allow_unverified=options.allow_unverified, overwrite=options.overwrite, on_progress=show,
    )  # fmt: skip
    display.say(f"{made.path}: {made.kind}, {size(made.size_bytes)}")
    display.say(made.certificate.sentence)
    for note in made.notes:
        display.note(note)
    display.say("next: " + command("chat", made.path))
    return {
        "out": str(made.path), "type": made.kind, "size_bytes": made.size_bytes, "notes": made.notes,
        "certificate": made.certificate.as_dict(),
    }  # fmt: skip


WAYS = {"adapter": _adapter, "soft prompt": _adapter, "patched": _patched, "merged": _merged}


def _saying(plan: Sequence[str], display: Listener) -> OnProgress:
    """What draws the work, and says the plan before the first of it: what is refused before that needs none."""
    told = iter(plan)

    def show(progress: Progress) -> None:
        for line in told:
            display.say(line)
        display.show(progress)

    return show


def _require_no_runner(asked: Asked, what: str) -> None:
    from edgelora.errors import ConfigError

    if asked.for_ is not None:
        raise ConfigError(f"--for with {what}", "it is told of a LoRA over its own base", "leave it out")


def _size(path: Path) -> str:
    return size(path.stat().st_size)
