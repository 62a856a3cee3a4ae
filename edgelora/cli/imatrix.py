"""`edgelora imatrix`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from edgelora.cli.arguments import Base, Json, Out, Overwrite, Unverified, scaled


def imatrix(
    model: Base,
    out: Out,
    data: Annotated[
        Path | None, typer.Option(help="The rows it was trained on: a file or folder.", show_default=False)
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A general text in UTF-8, mixed in by --mix.", show_default=False)
    ] = None,
    mix: Annotated[float, typer.Option(help="How many of all tokens are the general text's.")] = 0.5,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="An adapter[:scale] that will be merged: a folder or a GGUF; repeatable.", show_default=False
        ),
    ] = None,
    chunks: Annotated[int, typer.Option(help="Compute on at most this many windows of --context tokens.")] = 100,
    context: Annotated[int, typer.Option(help="Tokens of a window; a longer row is cut.")] = 512,
    engine: Annotated[str, typer.Option(help="llama.cpp, torch or auto.")] = "auto",
    output: Annotated[bool, typer.Option("--output", help="Watch the head too, as --process-output does.")] = False,
    chat_template: Annotated[
        str | None, typer.Option(help="For a model without one: chatml, or a Jinja file.", show_default=False)
    ] = None,
    allow_unverified_base: Unverified = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compute what quantizing must spare (an importance matrix) on your own rows, as llama.cpp's tools take it.

    Example: `edgelora imatrix mine-F16.gguf --data train.jsonl --text general.txt --out mine.imatrix.gguf`
    """
    from edgelora.cli.display import listener
    from edgelora.invocation import command
    from edgelora.pipeline.imatrix import Mix, Settings, compute_importance

    settings = Settings(Mix(data, text, mix, chunks, context), engine, output, chat_template, allow_unverified_base)
    adapters = [scaled(name) for name in adapter or []]
    with listener(as_json) as display:
        made = compute_importance(model, adapters, out, settings, overwrite=overwrite, on_progress=display.show)
        display.say(
            f"{out}: {len(made.importance.sums)} tensors, {made.task_tokens:,} tokens of the rows and "
            f"{made.general_tokens:,} of the text, by {made.engine.value} ({made.engine.why})"
        )
        for note in made.notes:
            display.note(note)
        small = out.with_name(f"{model.stem}-Q4_K_M.gguf")
        if not made.quantizable:
            display.say("next: give it to --imatrix where the 16-bit original of this model is quantized or merged")
        elif adapters and all(path.is_dir() for path, _ in adapters):
            merged = [part for name in adapter or [] for part in ("--adapter", name)]
            display.say("next: " + command("merge", model, *merged, "--to", "Q4_K_M", "--imatrix", out, "--out", small))
        elif not adapters and model.is_file():
            display.say("next: " + command("quantize", model, small, "Q4_K_M", "--imatrix", out))
    if as_json:
        print(json.dumps({
            "out": str(out), "tensors": len(made.importance.sums), "task_tokens": made.task_tokens,
            "general_tokens": made.general_tokens, "engine": made.engine.value, "why": made.engine.why,
            "notes": made.notes,
        }))  # fmt: skip
