"""`edgelora export`."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from edgelora.cli.arguments import CHECKED_ROWS, Base, CheckData, CheckRows, For, Json, Out, Overwrite, Unverified


class Door(StrEnum):
    """How an adapter leaves."""

    adapter = "adapter"
    patched = "patched"


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
    door: Annotated[
        Door,
        typer.Option(
            help="adapter: a GGUF LoRA. patched: the base with an IA3, DoRA, BitFit or LayerNorm in its own "
            "numbers, not quantized again, and a LoRA over it for the rest."
        ),
    ] = Door.adapter,
    allow_unverified_base: Unverified = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write an adapter as a GGUF that llama.cpp hot-loads, or as a patched base, and check it against torch.

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
    if door is Door.patched:
        if for_ is not None:
            raise ConfigError("--for with --door patched", "it is told of one file", "leave it out")
        checked = {"dtype": type_.upper(), "data": data, "n_rows": check_rows}
        _patched(base, adapter, out, checked, allow_unverified_base, overwrite, as_json)
        return
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


def _patched(
    base: Path, adapter: Path, out: Path, checked: dict[str, Any], unverified: bool, overwrite: bool, as_json: bool
) -> None:
    from edgelora.cli.display import Display
    from edgelora.invocation import command
    from edgelora.pipeline.patch import patch

    with Display() as display:
        made = patch(
            base, adapter, out, **checked, allow_unverified=unverified, overwrite=overwrite, on_progress=display.show
        )
        found = made.certificate
        display.say(
            f"{out}: {out.stat().st_size / 1e6:.1f} MB, no weight rounded by more than {made.error:.1g} of its own; "
            f"checked on {found.n_prompts} prompts: mean KL {found.adapter.kl_mean:.2g} (limit {found.kl_limit:.2g}), "
            f"same top {found.adapter.same_top:.1%}"
        )
        for note in made.notes:
            display.say(note)
        display.say("next: " + command("chat", out, *(["--adapter", str(made.rest)] if made.rest else [])))
    if as_json:
        print(json.dumps(made.as_dict()))


def _as_lora(base: Path, adapter: Path, out: Path, unverified: bool, overwrite: bool, as_json: bool) -> None:
    from edgelora.cli.display import Display
    from edgelora.pipeline.import_adapter import export_as_lora

    made = export_as_lora(base, adapter, out, allow_unverified=unverified, overwrite=overwrite)
    with Display() as display:
        display.say(f"{out}: a LoRA on {made.layers} layers, rank {', '.join(map(str, made.ranks))}")
    if as_json:
        print(json.dumps(made.as_dict()))
