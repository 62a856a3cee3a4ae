"""`edgelora export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from edgelora.cli.arguments import CHECKED_ROWS, Base, CheckData, CheckRows, For, Json, Out, Overwrite, Unverified

Adapter = Annotated[Path, typer.Argument(help="An adapter folder in PEFT's format.", show_default=False)]


def export(
    base: Base,
    adapter: Adapter,
    out: Out,
    type_: Annotated[str, typer.Option("--type", help="Numbers of the adapter file: F16 or F32.")] = "F16",
    data: CheckData = None,
    check_rows: CheckRows = CHECKED_ROWS,
    for_: For = None,
    as_lora: Annotated[
        bool, typer.Option("--as-lora", help="Write a plain LoRA of PEFT's instead, a folder, where that is exact.")
    ] = False,
    allow_unverified_base: Unverified = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write an adapter as a GGUF that llama.cpp hot-loads, and check it against torch on the same tokens.

    Example: `edgelora export base.gguf adapters/mine --out mine.gguf`
    """
    from edgelora.cli.display import Display
    from edgelora.errors import ConfigError
    from edgelora.invocation import command
    from edgelora.pipeline.certificate import Reference
    from edgelora.pipeline.export import export as run
    from edgelora.pipeline.runners import prepare_for

    if as_lora:
        if for_ is not None or data is not None:
            raise ConfigError(
                "--as-lora with --for or --data", "PEFT's files run nowhere in llama.cpp", "leave them out"
            )
        _as_lora(base, adapter, out, allow_unverified_base, overwrite, as_json)
        return
    if type_.upper() not in ("F16", "F32"):
        raise ConfigError(f"--type {type_}", "an adapter file holds F16 or F32 numbers", "pass --type F16")
    delivery = prepare_for(for_, Reference(base, ((adapter, 1.0),)), out, live=True, overwrite=overwrite)
    with Display() as display:
        certificate = run(
            base, adapter, out, dtype=type_.upper(), data=data, n_rows=check_rows,
            allow_unverified=allow_unverified_base, overwrite=overwrite, on_progress=display.show,
        )  # fmt: skip
        display.say(
            f"{out}: {out.stat().st_size / 1e6:.1f} MB, checked on {certificate.n_prompts} prompts: mean KL "
            f"{certificate.adapter.kl_mean:.2g} (limit {certificate.kl_limit:.2g}), same top "
            f"{certificate.adapter.same_top:.1%}"
        )
        if delivery is not None:
            delivery.write()
            for note in delivery.notes:
                display.say(note)
        display.say("next: " + (delivery.command if delivery else command("chat", base, "--adapter", str(out))))
    if as_json:
        made = {"out": str(out), "size_bytes": out.stat().st_size, "certificate": certificate.as_dict()}
        print(json.dumps(made | ({"for": delivery.as_dict()} if delivery else {})))


def _as_lora(base: Path, adapter: Path, out: Path, unverified: bool, overwrite: bool, as_json: bool) -> None:
    from edgelora.cli.display import Display
    from edgelora.pipeline.import_adapter import export_as_lora

    made = export_as_lora(base, adapter, out, allow_unverified=unverified, overwrite=overwrite)
    with Display() as display:
        display.say(f"{out}: a LoRA on {made.layers} layers, rank {', '.join(map(str, made.ranks))}")
    if as_json:
        print(json.dumps(made.as_dict()))
