"""`edgelora methods`."""

from __future__ import annotations

import json

from edgelora.cli.arguments import Json


def methods(as_json: Json = False) -> None:
    """List the ways to adapt a base: what each of them trains, and where its adapter can go.

    Example: `edgelora methods`
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from edgelora.cli.display import output
    from edgelora.pipeline.methods import described

    rows = described()
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("--method", "trains", "leaves as", "paper", box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(row["name"], row["trains"], ", ".join(row["leaves_as"]) or "-", row["paper"])
    output().print(table)
    print("adapter: llama.cpp loads it over any quantization of its base (`export`)")
    print("patched: a base with it in its own numbers (`export`)")
    print("merged: it becomes part of a model (`merge`)")
    print("soft prompt: edgelora's own chat and generate put it before prompts (`export`)")
    print("-: it runs in torch alone (`eval --in torch`)")
    print("QLoRA and QDoRA are lora and dora over a quantized base (GGUF, or by")
    print("--base-dtype nf4), QPiSSA is loftq over what `residual` writes")
