"""`edgelora export`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgelora.cli.arguments import CHECKED_ROWS, Base, CheckData, CheckRows, For, Json, Overwrite, Unverified
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


Adapter = Annotated[Path, typer.Argument(help="An adapter folder in PEFT's format.", show_default=False)]
Out = Annotated[Path | None, typer.Option(help="Where the result goes; not needed with --plan.", show_default=False)]
SvdRank = Annotated[
    int | None,
    typer.Option(
        "--svd-rank", min=1, show_default=False,
        help="Of a DoRA, an IA3 or whole weights write the nearest LoRA of this rank, and measure what that loses.",
    ),
]  # fmt: skip
Rank = Annotated[
    int | None,
    typer.Option(
        min=1, show_default=False,
        help="Of a DyLoRA take its first ranks alone, as it learned to be used: exact, by every door and as a LoRA.",
    ),
]  # fmt: skip


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


def export(
    base: Base,
    adapter: Adapter,
    out: Out = None,
    type_: Annotated[
        str | None,
        typer.Option(
            "--type", help="Numbers of a LoRA: F16, F32 or Q8_0; with --door merged, the model's.", show_default="F16"
        ),
    ] = None,
    data: CheckData = None,
    check_rows: CheckRows = CHECKED_ROWS,
    for_: For = None,
    as_lora: Annotated[
        bool, typer.Option("--as-lora", help="Write a plain LoRA of PEFT's instead, a folder, where that is exact.")
    ] = False,
    door: Annotated[
        Door | None,
        typer.Option(
            help="adapter: a GGUF LoRA. patched: the base with an IA3, DoRA, BitFit or LayerNorm in its own numbers, "
            "not quantized again, and a LoRA over it for the rest. soft-prompt: what stands before every prompt. "
            "merged: a model of its own.",
            show_default="the first that is exact",
        ),
    ] = None,
    rank: Rank = None,
    svd_rank: SvdRank = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say which door, at what cost and why; write nothing.")] = False,
    allow_unverified_base: Unverified = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write an adapter as what llama.cpp can run of it, by the most exact door there is, and check it against torch.

    Example: `edgelora export base.gguf adapters/mine --out mine.gguf`
    """
    from edgelora.cli.display import listener
    from edgelora.errors import ConfigError
    from edgelora.pipeline.export import ExportOptions

    _require_one_way(as_lora, door, svd_rank, plan)
    _require_one_rank(rank, svd_rank)
    at_rank = {} if rank is None else {"rank": rank}
    if plan:
        with _at_rank(rank, base, adapter, allow_unverified_base) as source:
            _show_plan(base, source, type_ or "F16", allow_unverified_base, at_rank if as_json else None)
        return
    if out is None:
        raise ConfigError("export without --out", "the result needs a place", "pass --out FILE, or --plan to look only")
    options = ExportOptions((type_ or "F16").upper(), data, check_rows, allow_unverified_base, overwrite)
    with listener(as_json) as display, _at_rank(rank, base, adapter, allow_unverified_base) as source:
        asked = Asked(base, source, out, type_, for_, options)
        if as_lora:
            made = _as_lora(asked, display)
        elif svd_rank is not None:
            made = _svd(asked, svd_rank, display)
        else:
            made = _by_door(asked, door, display)
    if as_json:
        print(json.dumps(made | at_rank))


def _show_plan(
    base: Path, adapter: Path, dtype: str, unverified: bool, as_json_with: Mapping[str, object] | None
) -> None:
    """The doors, in words; or as one JSON object, with these keys beside the plan's."""
    from edgelora.pipeline.exit_plan import in_words, plan

    found = plan(base, adapter, dtype, allow_unverified=unverified, measure=True)
    words = "\n".join(in_words(found)) if as_json_with is None else json.dumps({**found.as_dict(), **as_json_with})
    print(words)


def _require_one_way(as_lora: bool, door: Door | None, svd_rank: int | None, plan: bool) -> None:
    """Raise ConfigError where one of these would be passed over for another."""
    from edgelora.errors import ConfigError

    ways = {"--as-lora": as_lora, "--door": door is not None, "--svd-rank": svd_rank is not None, "--plan": plan}
    given = [name for name, there in ways.items() if there]
    if len(given) > 1:
        raise ConfigError(
            what=f"export {' with '.join(given)}",
            why="each of them is a way of its own, and --plan tells of all doors",
            fix=f"pass one of them, {' or '.join(given)}",
        )


def _require_one_rank(rank: int | None, svd_rank: int | None) -> None:
    """Raise ConfigError for two ranks at once."""
    from edgelora.errors import ConfigError

    if rank is not None and svd_rank is not None:
        raise ConfigError(
            what="export --rank with --svd-rank",
            why="the first ranks of a DyLoRA are exact, and the nearest LoRA of any adapter is not",
            fix="pass --rank for a DyLoRA, --svd-rank for others",
        )


def _at_rank(rank: int | None, base: Path, adapter: Path, unverified: bool) -> AbstractContextManager[Path]:
    """The folder to export: the adapter's own, or while it is open that of the DyLoRA at this rank."""
    from edgelora.pipeline.first_ranks import at_rank

    return nullcontext(adapter) if rank is None else at_rank(base, adapter, rank, allow_unverified=unverified)


def _by_door(asked: Asked, door: Door | None, display: Listener) -> dict[str, Any]:
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


def _saying(plan: Sequence[str], display: Listener) -> OnProgress:
    """What draws the work, and says the plan before the first of it: what is refused before that needs none."""
    told = iter(plan)

    def show(progress: Progress) -> None:
        for line in told:
            display.say(line)
        display.show(progress)

    return show


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


def _svd(asked: Asked, rank: int, display: Listener) -> dict[str, Any]:
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


def _size(path: Path) -> str:
    return size(path.stat().st_size)


WAYS = {"adapter": _adapter, "soft prompt": _adapter, "patched": _patched, "merged": _merged}


def _require_no_runner(asked: Asked, what: str) -> None:
    from edgelora.errors import ConfigError

    if asked.for_ is not None:
        raise ConfigError(f"--for with {what}", "it is told of a LoRA over its own base", "leave it out")


def _as_lora(asked: Asked, display: Listener) -> dict[str, Any]:
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
