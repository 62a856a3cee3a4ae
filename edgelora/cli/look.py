"""`edgelora quickstart` and `edgelora doctor`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from edgelora.cli.arguments import Json


def quickstart(
    epochs: Annotated[float, typer.Option(help="How often each training row is seen.")] = 1.5,
    as_json: Json = False,
) -> None:
    """The whole path on a real model: train, export, check, merge, quantize, measure. About ten minutes.

    Example: `edgelora quickstart`
    """
    from edgelora.cli.display import listener
    from edgelora.cli.table import draw
    from edgelora.evaluate.report import as_json as to_json
    from edgelora.pipeline.quickstart import quickstart as run

    with listener(as_json) as display:
        result = run(display.say, display.show, epochs)
    if as_json:
        print(json.dumps({"folder": str(result.folder), "rows": to_json(result.rows)}))
        return
    draw(result.rows)
    print(f"\n{result.seconds / 60:.1f} minutes; the report is in {result.folder / 'report.md'} (and .json)")
    print("\nTalk to it, and switch the adapter on and off with /use home and /base:\n")
    print(f"  {result.next_commands[0]}\n")
    print("Train a second, very different adapter, and chat with both (/use couplets):\n")
    for line in result.next_commands[1:]:
        print(f"  {line}")


def doctor(as_json: Json = False) -> None:
    """What this machine has, and which device and number format would be chosen and why.

    Example: `edgelora doctor`
    """
    from edgelora.pipeline.doctor import examine

    facts = examine()
    if as_json:
        print(json.dumps(facts))
        return
    from rich.console import Console

    console = Console(highlight=False)
    for name, value in facts.items():
        if isinstance(value, dict):
            value = f"{value['value']} ({value['why']})"
        elif name.endswith("_bytes"):
            value = "unknown" if value is None else f"{value / 1e9:.1f} GB"
        console.print(f"[bold]{name.removesuffix('_bytes').replace('_', ' '):<16}[/bold] {value}", soft_wrap=True)
