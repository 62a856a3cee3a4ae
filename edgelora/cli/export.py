"""`edgelora export`, `merge` and `quantize`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from edgelora.cli.arguments import Base, Json, Out, Overwrite, Unverified, scaled

Adapter = Annotated[Path, typer.Argument(help="An adapter folder in PEFT's format.", show_default=False)]


def export(
    base: Base,
    adapter: Adapter,
    out: Out,
    type_: Annotated[str, typer.Option("--type", help="Numbers of the adapter file: F16 or F32.")] = "F16",
    data: Annotated[Path | None, typer.Option(help="Rows to check with; a few built-in ones without it.")] = None,
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
    from edgelora.pipeline.export import export as run

    if type_.upper() not in ("F16", "F32"):
        raise ConfigError(f"--type {type_}", "an adapter file holds F16 or F32 numbers", "pass --type F16")
    with Display() as display:
        certificate = run(
            base, adapter, out, dtype=type_.upper(), data=data, allow_unverified=allow_unverified_base,
            overwrite=overwrite, on_progress=display.show,
        )  # fmt: skip
        display.say(
            f"{out}: {out.stat().st_size / 1e6:.1f} MB, checked on {certificate.n_prompts} prompts: mean KL "
            f"{certificate.adapter.kl_mean:.2g} (limit {certificate.kl_limit:.2g}), same top "
            f"{certificate.adapter.same_top:.1%}"
        )
        display.say("next: " + command("chat", base, "--adapter", str(out)))
    if as_json:
        print(json.dumps({"out": str(out), "size_bytes": out.stat().st_size, "certificate": certificate.as_dict()}))


def merge(
    base: Base,
    out: Out,
    adapter: Annotated[list[str], typer.Option(help="An adapter folder[:scale]; repeatable.", show_default=False)],
    to: Annotated[str, typer.Option(help="F16, or a quantization such as Q4_K_M.")] = "F16",
    allow_unverified_base: Unverified = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Merge adapters into the base and write one GGUF.

    Example: `edgelora merge base.gguf --adapter adapters/mine --to Q8_0 --out mine-Q8_0.gguf`
    """
    from edgelora.cli.display import Display
    from edgelora.pipeline.merge import merge as run

    with Display() as display:
        merged = run(
            base, [scaled(text) for text in adapter], out, quant=to, allow_unverified=allow_unverified_base,
            overwrite=overwrite, on_progress=display.show,
        )  # fmt: skip
        display.say(f"{merged.path}: {to.upper()}, {merged.size_bytes / 1e6:.1f} MB")
        for note in merged.notes:
            display.console.print(f"note: {note}", style="yellow", soft_wrap=True)
    if as_json:
        print(json.dumps({"out": str(out), "size_bytes": merged.size_bytes, "notes": merged.notes}))


def quantize(
    source: Annotated[Path, typer.Argument(help="A whole F16, BF16 or F32 GGUF model.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The file to write.", show_default=False)],
    kind: Annotated[str, typer.Argument(metavar="TYPE", help="Such as Q4_K_M.", show_default=False)],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Quantize a GGUF with llama.cpp's own quantizer, in-process.

    Example: `edgelora quantize mine-F16.gguf mine-Q4_K_M.gguf Q4_K_M`
    """
    from edgelora.cli.display import Display
    from edgelora.pipeline.merge import quantize as run

    with Display() as display:
        result = run(source, out, kind, overwrite=overwrite, on_progress=display.show)
        display.say(f"{out}: {kind.upper()}, {result.size_bytes / 1e6:.1f} MB")
    if as_json:
        print(json.dumps({"out": str(out), "size_bytes": result.size_bytes}))
