"""`edgelora convert`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from edgelora.cli.arguments import Base, Json, Out, Overwrite
from edgelora.words import size


def convert(
    base: Base,
    out: Out,
    type_: Annotated[str, typer.Option("--type", help="Numbers of the weights: F16, BF16 or F32.")] = "F16",
    chat_template: Annotated[
        str | None, typer.Option(help="For a base without one: chatml, or a Jinja file.", show_default=False)
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a Hugging Face checkpoint as one GGUF that llama.cpp runs, and check it against torch.

    Example: `edgelora convert SmolLM2-135M-Instruct/ --out models/SmolLM2-135M-Instruct-F16.gguf`
    """
    from edgelora.cli.display import listener
    from edgelora.invocation import command
    from edgelora.pipeline.convert import convert as run

    with listener(as_json) as display:
        made = run(
            base, out, dtype=type_.upper(), template=chat_template, overwrite=overwrite, on_progress=display.show
        )
        display.say(
            f"{made.path}: {type_.upper()}, {size(made.size_bytes)}, checked on {made.fidelity.n_tokens} "
            f"tokens: mean KL {made.fidelity.kl_mean:.2g}, same top {made.fidelity.same_top:.1%}"
        )
        for note in made.notes:
            display.note(note)
        smaller = out.with_name(f"{out.stem}-Q4_K_M.gguf")
        display.say("next: " + command("quantize", out, smaller, "Q4_K_M"))
    if as_json:
        print(json.dumps({
            "out": str(out), "size_bytes": made.size_bytes, "fidelity": made.fidelity.as_dict(), "notes": made.notes,
        }))  # fmt: skip
