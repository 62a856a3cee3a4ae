"""`edgelora eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgelora.cli.arguments import Base, Engine, Json, Unverified, scaled

if TYPE_CHECKING:
    from edgelora.pipeline.evaluate import Chosen

Metric = Annotated[str, typer.Option(help="When an answer is right: auto, exact, json, number or label.")]
Pattern = Annotated[
    str | None,
    typer.Option(
        metavar="REGEX", help="In its place: right is what has the same as the reference there.", show_default=False
    ),
]


def evaluate(
    base: Base,
    data: Annotated[Path, typer.Option(help="Held-out rows to answer, or multiple choice.", show_default=False)],
    adapter: Annotated[
        str | None, typer.Option(help="An adapter[:scale] to run live over the model.", show_default=False)
    ] = None,
    engine: Engine = "auto",
    metric: Metric = "auto",
    pattern: Pattern = None,
    allow_unverified_base: Unverified = False,
    as_json: Json = False,
) -> None:
    """Answer held-out rows in llama.cpp, or choose among alternatives: right answers, loss, speed and memory.

    Example: `edgelora eval base.gguf --adapter mine.gguf --data test.jsonl`
    """
    from edgelora.cli.display import listener
    from edgelora.cli.table import draw
    from edgelora.evaluate.report import as_json as to_json
    from edgelora.pipeline.engines import TORCH, choose_engine
    from edgelora.pipeline.evaluate import Cell, choose, is_choice_file
    from edgelora.pipeline.evaluate import evaluate as run

    path, scale = scaled(adapter) if adapter else (None, 1.0)
    where = choose_engine(engine, base, path)
    name = base.name if path is None else f"{base.name} + {path.name}"
    cell = Cell(name, base, data, path, scale, allow_unverified_base, metric, pattern, where.value)
    with listener(as_json) as display:
        if where.value == TORCH:
            display.say(f"in torch ({where.why})")
        if is_choice_file(data):
            _show(choose(cell, display.show), as_json)
            return
        row = run(cell, display.show)
    if as_json:
        print(json.dumps({
            **to_json([row])[0], "metric": row.scored.metric, "answers": row.scored.answers, "engine": where.value,
        }, ensure_ascii=False))  # fmt: skip
    else:
        draw([row], metric=row.scored.metric)


def _show(found: Chosen, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found.as_dict()))
        return
    from edgelora.cli.display import output
    from edgelora.evaluate.choices import COUNTED

    facts = found.as_dict()
    lines = [f"{facts['rows']:,} rows, of which guessing gets {facts['chance']:.1%} right"]
    lines += [f"{facts[custom]:.1%} by {said}" for custom, said in COUNTED.items()]
    output().print("\n".join(lines), soft_wrap=True)
