"""`edgelora import`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from edgelora.cli.arguments import Base, Json, Out, Overwrite, Unverified

Source = Annotated[
    Path,
    typer.Argument(help="A GGUF LoRA, or an adapter folder of PEFT's or mlx-lm's.", show_default=False),
]


def import_(
    base: Base,
    source: Source,
    out: Out,
    allow_unverified_base: Unverified = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make an adapter folder of what another program wrote: a GGUF LoRA, mlx-lm's or PEFT's, in any of its layouts.

    Example: `edgelora import base.gguf mlx-adapters --out adapters/mine --allow-unverified-base`
    """
    from edgelora.cli.display import listener
    from edgelora.pipeline.import_adapter import import_adapter as run
    from edgelora.pipeline.methods import what_comes_next

    made = run(base, source, out, allow_unverified=allow_unverified_base, overwrite=overwrite)
    with listener(as_json) as display:
        ranks = f", rank {', '.join(map(str, made.ranks))}" if made.ranks else ""
        display.say(f"{out}: {made.title} from {made.kind} on {made.layers} layers{ranks}")
        for note in made.notes:
            display.note(note)
        display.say(f"next: {what_comes_next(made.method, base, out)}")
    if as_json:
        print(json.dumps(made.as_dict()))
