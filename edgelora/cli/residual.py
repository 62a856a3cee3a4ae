"""`edgelora residual`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from edgelora.cli.arguments import Base, Json, Out, Overwrite
from edgelora.words import size

To = Annotated[str, typer.Option(help="A quantization such as Q4_0 or Q4_K_M.", show_default=False)]
Rank = Annotated[int, typer.Option(min=1, help="How many ranks are taken out: those that the adapter will have.")]
Over = Annotated[
    Path | None,
    typer.Option(help="Take out what this quantized file lost, not the principal part.", show_default=False),
]


def residual(
    base: Base,
    out: Out,
    to: To,
    rank: Rank = 16,
    over: Over = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Quantize a 16-bit model without its principal part, which the adapter brings back: the base of QPiSSA and LoftQ.

    Example: `edgelora residual SmolLM2-135M-Instruct-F16.gguf --to Q4_0 --rank 16 --out rest-Q4_0.gguf`
    """
    from edgelora.cli.display import listener
    from edgelora.invocation import command
    from edgelora.pipeline.certificate import Output
    from edgelora.pipeline.residual import write_residual

    with listener(as_json) as display:
        made = write_residual(base, Output(out, overwrite), to, rank, over, display.show)
        display.say(f"{made.path}: {made.kind} without {made.rank} ranks, {size(made.size_bytes)}")
        display.say(made.certificate.sentence)
        options = ("--method", "loftq", "--original", base, "--rank", str(rank), "--out", "ADAPTER")
        display.say("next: " + command("train", out, "ROWS", *options))
    if as_json:
        print(json.dumps({
            "out": str(out), "type": made.kind, "rank": made.rank, "size_bytes": made.size_bytes,
            "certificate": made.certificate.as_dict(),
        }))  # fmt: skip
