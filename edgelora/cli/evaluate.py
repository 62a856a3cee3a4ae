"""`edgelora eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from edgelora.cli.arguments import Base, Json, Unverified, scaled


def evaluate(
    base: Base,
    data: Annotated[Path, typer.Option(help="Held-out rows to answer: JSONL.", show_default=False)],
    adapter: Annotated[str | None, typer.Option(help="A GGUF adapter[:scale] to run live over the model.")] = None,
    allow_unverified_base: Unverified = False,
    as_json: Json = False,
) -> None:
    """Answer held-out rows in llama.cpp: exact match, loss, speed and memory.

    Example: `edgelora eval base.gguf --adapter mine.gguf --data test.jsonl`
    """
    from edgelora.cli.display import Display
    from edgelora.cli.table import draw
    from edgelora.evaluate.report import as_json as to_json
    from edgelora.pipeline.evaluate import Cell
    from edgelora.pipeline.evaluate import evaluate as run

    path, scale = scaled(adapter) if adapter else (None, 1.0)
    name = base.name if path is None else f"{base.name} + {path.name}"
    with Display() as display:
        row = run(Cell(name, base, data, path, scale, allow_unverified_base), display.show)
    if as_json:
        print(json.dumps({**to_json([row])[0], "answers": row.scored.answers}, ensure_ascii=False))
    else:
        draw([row])
