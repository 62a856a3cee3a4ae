"""`edgelora export`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from edgelora.cli.arguments import CHECKED_ROWS, Base, CheckData, CheckRows, For, Json, Overwrite, Unverified
from edgelora.cli.export_ways import Asked, Door, as_plain_lora, by_door, nearest_lora

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
            made = as_plain_lora(asked, display)
        elif svd_rank is not None:
            made = nearest_lora(asked, svd_rank, display)
        else:
            made = by_door(asked, door, display)
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
