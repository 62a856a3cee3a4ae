"""`edgelora compose`."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgelora.cli.arguments import Base, Json, Out, Overwrite, Unverified, scaled
from edgelora.words import size

if TYPE_CHECKING:
    from edgelora.pipeline.compose import Composition

Adapter = Annotated[
    list[str], typer.Option(help="A folder[:weight]; repeatable. A negative weight takes away.", show_default=False)
]
How = Annotated[
    str,
    typer.Option(
        help="sum, linear, ties, dare, dare_ties, magnitude; all but the first two also with _factors behind: of A and "
        "of B by themselves, where they are of ΔW = B A.",
    ),
]
Density = Annotated[
    float | None,
    typer.Option(help="The share of entries that ties, dare and magnitude keep.", show_default="0.5"),
]
Rank = Annotated[
    int | None,
    typer.Option(help="Of the result, by SVD.", show_default="a sum: all ranks together; else the largest"),
]
Data = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=ROWS", help="Score all models on these rows; repeatable.", show_default=False),
]


def compose(
    base: Base,
    adapter: Adapter,
    out: Out,
    how: How = "sum",
    density: Density = None,
    rank: Rank = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what dare drops.")] = 0,
    report: Annotated[bool, typer.Option("--report", help="Measure how the adapters meet in each layer.")] = False,
    data: Data = None,
    allow_unverified_base: Unverified = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compose adapters of one base into one: sum, TIES, DARE, magnitude pruning; at any rank.

    Example: `edgelora compose base.gguf --adapter home --adapter mail:0.5 --how ties --out both`
    """
    from edgelora.cli.display import listener
    from edgelora.invocation import command
    from edgelora.pipeline.compose import ComposeOptions, Recipe, compose_adapters
    from edgelora.pipeline.task_scores import Task

    recipe = Recipe(how, rank=rank, seed=seed)
    if density is not None:
        _require_thinning(how, density)
        recipe = replace(recipe, density=density)
    options = ComposeOptions(
        recipe, report, [Task(*_task(text)) for text in data or ()],
        allow_unverified_base, overwrite,
    )  # fmt: skip
    with listener(as_json) as display:
        made = compose_adapters(base, [scaled(text) for text in adapter], out, options, display.show)
        lost = "" if made.lost is None else f", {made.lost:.1%} of ΔW is left out by its rank"
        ranks = ", ".join(map(str, sorted(made.ranks)))
        display.say(f"{out}: {size(made.size_bytes)}, rank {ranks}{lost}")
        for note in made.notes:
            display.note(note)
        display.say("next: " + command("export", base, out, "--out", Path(f"{out}.gguf")))
    if as_json:
        print(json.dumps(made.as_dict()))
    else:
        _draw(made)


def _require_thinning(how: str, density: float) -> None:
    """Raise ConfigError for a density that nothing would use. A `how` that is none is refused where it is used."""
    from edgelora.errors import ConfigError
    from edgelora.pipeline.compose import HOWS

    if how in HOWS and HOWS[how].thins is None:
        raise ConfigError(
            what=f"--density {density:g} with --how {how}",
            why="all entries are kept in that",
            fix="leave it out, or pass --how ties, dare or magnitude",
        )


def _task(text: str) -> tuple[str, Path]:
    """`mail=rows.jsonl`, or the file alone, whose name is then the task's."""
    name, equals, path = text.partition("=")
    return (name, Path(path)) if equals and name and not Path(text).is_file() else (Path(text).stem, Path(text))


def _draw(made: Composition) -> None:
    """The tables that were asked for, a line for each layer of the model and for each task."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from edgelora.cli.display import output
    from edgelora.pipeline.compose import COMPOSED

    if made.layers:
        found = dict.fromkeys(name for layer in made.layers for name in layer.intruders if name != COMPOSED)
        names = [*found, COMPOSED]
        table = Table("layer", "cosine", "conflict", *names, box=SIMPLE_HEAD, pad_edge=False)
        blocks: dict[str, list[int]] = {}
        for number, layer in enumerate(made.layers):
            blocks.setdefault(_block(layer.module), []).append(number)
        for block, numbers in blocks.items():
            inside = [made.layers[number] for number in numbers]
            met = [meeting for layer in inside for meeting in layer.meetings]
            table.add_row(
                block,
                _span([meeting.cosine for meeting in met]),
                _span([meeting.conflict for meeting in met]),
                *(str(sum(layer.intruders.get(name, 0) for layer in inside)) for name in names),
            )
        output().print(table)
        print("cosine of the changes and share of opposite signs: least … most; under a name: intruder dimensions")
    if made.scores:
        table = Table("task", "model", "rows", "loss", "right", "by", box=SIMPLE_HEAD, pad_edge=False)
        for s in made.scores:
            table.add_row(s.task, s.model, str(s.n_rows), f"{s.loss:.4f}", f"{s.right:.1%}", s.metric)
        output().print(table)


def _block(module: str) -> str:
    """`model.layers.3.mlp.up_proj` → 3."""
    found = re.search(r"\.layers\.(\d+)\.", module)
    return found[1] if found else module


def _span(values: list[float]) -> str:
    return f"{min(values):.2f} … {max(values):.2f}" if values else "–"
