"""`edgelora untie`."""

from __future__ import annotations

import json

from edgelora.cli.arguments import GGUFBase, Json, Overwrite
from edgelora.cli.arguments import Out as Result
from edgelora.words import size


def untie(base: GGUFBase, out: Result, overwrite: Overwrite = False, as_json: Json = False) -> None:
    """Give a base whose head is its embedding a head of its own, the same numbers: adapters of either need that.

    Example: `edgelora untie base.gguf --out base-untied.gguf`
    """
    from edgelora.cli.display import listener
    from edgelora.pipeline.untie import untie as run

    with listener(as_json) as display:
        made = run(base, out, overwrite=overwrite, on_progress=display.show)
        display.say(f"{out}: {size(made.size_bytes)}, computes what {base.name} does")
        display.say(made.certificate.sentence)
    if as_json:
        print(json.dumps({
            "out": str(out), "size_bytes": made.size_bytes, "certificate": made.certificate.as_dict(),
        }))  # fmt: skip
