"""`edgelora merge`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from edgelora.cli.arguments import (
    CHECKED_ROWS,
    Base,
    CheckData,
    CheckRows,
    For,
    Imatrix,
    Json,
    Out,
    Overwrite,
    PlanFile,
    Unverified,
    scaled,
)  # fmt: skip
from edgelora.words import size

Adapters = Annotated[
    list[str] | None, typer.Argument(metavar="ADAPTER[:SCALE]", help="Adapter folders.", show_default=False)
]
Adapter = Annotated[
    list[str] | None, typer.Option(help="The same, spelled out: a folder[:scale]; repeatable.", show_default=False)
]
To = Annotated[
    str | None,
    typer.Option(help="F16, BF16, F32, a quantization such as Q4_K_M, or hf: a folder.", show_default="F16"),
]
HfDtype = Annotated[
    str | None, typer.Option(help="Numbers of a folder: F32, F16, BF16.", show_default="as the base has them")
]


def merge(
    base: Base,
    out: Out,
    adapters: Adapters = None,
    adapter: Adapter = None,
    to: To = None,
    imatrix: Imatrix = None,
    plan: PlanFile = None,
    hf_dtype: HfDtype = None,
    data: CheckData = None,
    check_rows: CheckRows = CHECKED_ROWS,
    for_: For = None,
    allow_unverified_base: Unverified = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Merge adapters into the base, quantize the result, and write one GGUF (or a Hugging Face folder) in one pass.

    Example: `edgelora merge base.gguf --adapter adapters/mine --to Q8_0 --out mine-Q8_0.gguf`
    """
    from edgelora.cli.display import listener
    from edgelora.errors import ConfigError
    from edgelora.pipeline.certificate import Reference
    from edgelora.pipeline.merge import MergeOptions
    from edgelora.pipeline.merge import merge as run
    from edgelora.pipeline.runners import prepare_for

    parts = [scaled(text) for text in (*(adapters or ()), *(adapter or ()))]
    if not parts:
        raise typer.BadParameter("name at least one, behind the base", param_hint="ADAPTER")
    if hf_dtype is not None and (to or "").upper() != "HF":
        raise ConfigError(
            what=f"--hf-dtype {hf_dtype.upper()}, and what is written is no Hugging Face folder",
            why="the types of a GGUF are those of --to or --plan",
            fix="leave it out, or pass --to hf",
        )
    options = MergeOptions(imatrix, plan, hf_dtype and hf_dtype.upper(), data, check_rows)
    delivery = prepare_for(for_, Reference(base, tuple(parts)), out, live=False, overwrite=overwrite)
    with listener(as_json) as display:
        merged = run(
            base, parts, out, quant=to, options=options,
            allow_unverified=allow_unverified_base, overwrite=overwrite, on_progress=display.show,
        )  # fmt: skip
        display.say(f"{merged.path}: {merged.kind}, {size(merged.size_bytes)}")
        display.say(merged.certificate.sentence)
        for note in merged.notes:
            display.note(note)
        if delivery is not None:
            delivery.write()
            for note in delivery.notes:
                display.say(note)
            display.say("next: " + delivery.command)
    if as_json:
        made = {
            "out": str(out), "type": merged.kind, "size_bytes": merged.size_bytes, "notes": merged.notes,
            "certificate": merged.certificate.as_dict(),
        }  # fmt: skip
        print(json.dumps(made | ({"for": delivery.as_dict()} if delivery else {})))
