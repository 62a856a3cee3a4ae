"""`edgelora report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgelora.cli.arguments import Base, Json, Unverified, scaled
from edgelora.cli.evaluate import Metric, Pattern

if TYPE_CHECKING:
    from edgelora.pipeline.report import Made

Adapter = Annotated[str | None, typer.Option(help="The adapter[:scale] to judge: a folder.", show_default=False)]
Quants = Annotated[str, typer.Option(help="Levels of quantization, with commas between.")]
Ways = Annotated[
    str | None,
    typer.Option(
        help="Of base, live (patched into the base, or in torch, where it is no LoRA for llama.cpp), merged, imatrix "
        "(merged, with the importance of your training rows), patched and torch.",
        show_default="live,merged",
    ),
]
Data = Annotated[
    list[Path] | None,
    typer.Option(help="Held-out rows to answer, and files of multiple choice; repeatable.", show_default=False),
]
Text = Annotated[Path | None, typer.Option(help="A general text: perplexity, KL, forgetting.", show_default=False)]
OutFolder = Annotated[
    Path | None,
    typer.Option(help="The report's folder; the same one goes on where it was.", show_default="NAME.report"),
]
AdapterFor = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TYPE=FOLDER", help="An adapter trained over the base at that very level; repeatable.",
        show_default=False,
    ),
]  # fmt: skip
Calibration = Annotated[
    Path | None,
    typer.Option(help="Rows for imatrix; those the adapter was trained on without it.", show_default=False),
]
Chunks = Annotated[int, typer.Option(help="How many windows of --text.", min=1)]
MaxSize = Annotated[str | None, typer.Option(help="Recommend nothing larger, such as 120MB.", show_default=False)]
MaxRam = Annotated[str | None, typer.Option(help="Nor what takes more memory.", show_default=False)]
MinQuality = Annotated[
    float | None, typer.Option(help="Nor what has fewer right answers, 0 to 1.", min=0, max=1, show_default=False)
]

SHOWN = ("size_mb", "right", "loss", "kl", "perplexity", "generation_tokens_per_s", "peak_mb")  # fits 80 columns


def report(
    base: Base,
    adapter: Adapter = None,
    quants: Quants = "Q2_K,Q3_K_M,Q4_K_M,Q5_K_M,Q6_K,Q8_0,F16",
    ways: Ways = None,
    data: Data = None,
    text: Text = None,
    out: OutFolder = None,
    adapter_for: AdapterFor = None,
    calibration: Calibration = None,
    chunks: Chunks = 64,
    context: Annotated[int, typer.Option(help="Tokens of a window.", min=8)] = 512,
    metric: Metric = "auto",
    pattern: Pattern = None,
    max_size: MaxSize = None,
    max_ram: MaxRam = None,
    min_quality: MinQuality = None,
    open_page: Annotated[bool, typer.Option("--open", help="Show the page in a browser.")] = False,
    allow_unverified_base: Unverified = False,
    as_json: Json = False,
) -> None:
    """Which file to ship: every way and level built, measured and put on one page, with a recommendation.

    Example: `edgelora report base.gguf --adapter adapters/mine --data test.jsonl --text wiki.txt --open`
    """
    from edgelora.cli.display import listener
    from edgelora.evaluate.recommend import Limits
    from edgelora.invocation import as_typed
    from edgelora.pipeline.grid import Asked
    from edgelora.pipeline.page import HTML
    from edgelora.pipeline.report import Heard, make_report

    limits = Limits(_bytes(max_size, "--max-size"), _bytes(max_ram, "--max-ram"), min_quality)
    mine = scaled(adapter) if adapter else None
    asked = Asked(
        base, out or Path(f"{(mine[0] if mine else base.with_suffix('')).resolve().name}.report"), mine,
        tuple(_words(quants)), tuple(_words(ways or "")), tuple(data or ()), text, dict(map(_for, adapter_for or ())),
        calibration, chunks, context, metric, pattern, allow_unverified_base,
    )  # fmt: skip
    with listener(as_json) as display:
        made = make_report(asked, as_typed(), limits, Heard(display.show, display.say, display.note))
    page = made.folder / HTML
    if as_json:
        print(json.dumps(_as_dict(made)))
    else:
        _draw(made, page)
    if open_page:
        typer.launch(str(page.resolve()))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _for(text: str) -> tuple[str, Path]:
    """`Q4_K_M=FOLDER`."""
    quant, equals, folder = text.partition("=")
    if not (quant and equals and folder):
        raise typer.BadParameter(f"{text} is not TYPE=FOLDER, such as Q4_K_M=adapters/mine", param_hint="--adapter-for")
    return quant.upper(), Path(folder)


def _bytes(text: str | None, option: str) -> int | None:
    from edgelora.cli.budget import size_bytes

    try:
        return None if text is None else size_bytes(text)
    except typer.BadParameter as e:
        e.param_hint = option
        raise


def _as_dict(made: Made) -> dict[str, object]:
    choice = made.choice
    return {
        "out": str(made.folder),
        "recommended": None if choice.file is None else {"cell": choice.cell, "file": choice.file},
        "why": choice.why,
        "cells": [
            {"name": cell.name, "status": cell.status, "why": cell.why, "path": cell.path} for cell in made.report.cells
        ],
    }


def _draw(made: Made, page: Path) -> None:
    from edgelora.cli.display import output
    from edgelora.cli.table import draw
    from edgelora.evaluate.cells import in_order
    from edgelora.evaluate.metrics import title_of_metric

    draw(in_order([cell for cell in made.report.cells if cell.measures]), SHOWN)
    metric = made.report.provenance.settings.get("metric")
    right = f"right: by {title_of_metric(str(metric))}\n\n" if metric else ""
    output().print(f"{right}{made.choice.why}\n\nthe page: {page}", markup=False, soft_wrap=True)
