"""`edgelora quantize`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgelora.cli import budget
from edgelora.cli.arguments import CHECKED_ROWS, CheckRows, Imatrix, Json, Overwrite, PlanFile
from edgelora.words import size

if TYPE_CHECKING:
    from edgelora.pipeline.quantize import Quantized, QuantizeSettings


Source = Annotated[Path, typer.Argument(help="A whole GGUF model: F16, BF16 or F32.", show_default=False)]
OutFile = Annotated[Path | None, typer.Argument(help="The file to write; left out with --dry-run.", show_default=False)]
Kind = Annotated[
    str | None, typer.Argument(metavar="TYPE", help="Such as Q4_K_M, or what the plan says.", show_default=False)
]
TensorTypes = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REGEX=TYPE",
        help="The type of tensors in whose name REGEX is found; repeatable.",
        show_default=False,
    ),
]
OutputType = Annotated[str | None, typer.Option(help="The type of output.weight.", show_default=False)]
EmbeddingType = Annotated[str | None, typer.Option(help="The type of token_embd.weight.", show_default=False)]
Pure = Annotated[bool, typer.Option("--pure", help="All tensors the same type, no mixture.")]
SavePlan = Annotated[Path | None, typer.Option(help="Write the plan here, to edit.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show types and size, and write nothing.")]
KeepSplit = Annotated[bool, typer.Option("--keep-split", help="Write a folder of as many parts as the source has.")]
AllowRequantize = Annotated[bool, typer.Option("--allow-requantize", help="Take a source that is quantized already.")]
Plain = Annotated[bool, typer.Option("--plain", help="Nothing in the file that llama-quantize would not write.")]
TargetSize = Annotated[
    str | None,
    typer.Option(help="Instead of TYPE: the best file of at most this, such as 90MB.", show_default=False),
]
TargetKl = Annotated[
    float | None,
    typer.Option(
        help="Instead of TYPE: the smallest file within this mean KL (nats) to IN, on a quarter of --data or "
        "--text that is held out.",
        show_default=False,
    ),
]
Text = Annotated[
    Path | None, typer.Option(help="With a target: a text to measure on, if not --data.", show_default=False)
]
Repair = Annotated[
    int | None,
    typer.Option(metavar="RANK", help="With a target: a LoRA beside it, if it beats more bits.", show_default=False),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Rows to check with, a few built-in ones without it; with a target: to measure on, as the model "
        "will see them.",
        show_default=False,
    ),
]


def quantize(
    source: Source,
    out: OutFile = None,
    kind: Kind = None,
    tensor_type: TensorTypes = None,
    output_type: OutputType = None,
    embedding_type: EmbeddingType = None,
    pure: Pure = False,
    imatrix: Imatrix = None,
    plan: PlanFile = None,
    save_plan: SavePlan = None,
    dry_run: DryRun = False,
    keep_split: KeepSplit = False,
    allow_requantize: AllowRequantize = False,
    plain: Plain = False,
    target_size: TargetSize = None,
    target_kl: TargetKl = None,
    text: Text = None,
    repair: Repair = None,
    data: Data = None,
    check_rows: CheckRows = CHECKED_ROWS,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Quantize a GGUF to any of llama.cpp's types, with its own choice for each tensor, yours, or the best for a size.

    Example: `edgelora quantize mine-F16.gguf mine-Q4_K_M.gguf Q4_K_M`
    """
    asked = budget.Asked(
        source, out, target_size, target_kl, data, text, imatrix, save_plan, repair, allow_requantize, overwrite
    )
    if asked.is_target({
        "TYPE": kind, "--plan": plan, "--tensor-type": tensor_type, "--output-type": output_type, "--pure": pure,
        "--embedding-type": embedding_type, "--keep-split": keep_split, "--plain": plain, "--dry-run": dry_run,
        "--check-rows": check_rows != CHECKED_ROWS,
    }):  # fmt: skip
        budget.run(asked, as_json=as_json)
        return

    from edgelora.pipeline.quantize import QuantizeSettings

    settings = QuantizeSettings(
        tuple(map(_override, tensor_type or ())), output_type, embedding_type, pure, keep_split, imatrix, plan,
        allow_requantize, plain, data, check_rows,
    )  # fmt: skip
    target, quant = _places(out, kind, dry_run=dry_run, planned=plan is not None)
    done = _done(_Places(source, target, save_plan, overwrite), quant, settings, as_json)
    if as_json:
        print(json.dumps(_as_json(done, target)))
    elif target is None:
        _draw(done)


@dataclass(frozen=True)
class _Places:
    """Where is read and written. `target`: None writes nothing but the plan."""

    source: Path
    target: Path | None
    save_plan: Path | None
    overwrite: bool


def _done(places: _Places, quant: str | None, settings: QuantizeSettings, as_json: bool) -> Quantized:
    """Quantize, or plan it, and say what came of it."""
    from edgelora.cli.display import listener
    from edgelora.pipeline.quantize import dry_run_of
    from edgelora.pipeline.quantize import quantize as run

    source, target, save_plan, overwrite = places.source, places.target, places.save_plan, places.overwrite
    with listener(as_json) as display:
        if target is None:
            done = dry_run_of(source, quant, settings, save_plan=save_plan, overwrite=overwrite)
        else:
            done = run(
                source, target, quant, settings, save_plan=save_plan, overwrite=overwrite, on_progress=display.show
            )
            display.say(f"{target}: {done.plan.kind}, {size(done.size_bytes)}")
            if done.certificate is not None:
                display.say(done.certificate.sentence)
        for note in done.notes:
            display.note(note)
    return done


def _places(out: Path | None, kind: str | None, *, dry_run: bool, planned: bool) -> tuple[Path | None, str | None]:
    """Where to write (None: nowhere) and the type: `IN TYPE` names no file, `IN OUT --plan FILE` no type."""
    from edgelora.pipeline.quantize import is_type

    if kind is None and out is not None and (is_type(str(out)) or (dry_run and not planned)):
        out, kind = None, str(out)
    if kind is None and not planned:
        raise typer.BadParameter("name one, such as Q4_K_M", param_hint="TYPE")
    if out is None and not dry_run:
        raise typer.BadParameter("name the file to write", param_hint="OUT")
    return None if dry_run else out, kind


def _override(text: str) -> tuple[str, str]:
    """`attn_v\\.weight=Q8_0` → (pattern, type). The pattern may hold `=`, the type does not."""
    pattern, equals, kind = text.rpartition("=")
    if not equals or not pattern or not kind:
        raise typer.BadParameter(f"{text} is not REGEX=TYPE, such as attn_v=Q8_0", param_hint="--tensor-type")
    return pattern, kind


def _as_json(done: Quantized, target: Path | None) -> dict[str, Any]:
    types = {
        kind.name: {"tensors": n, "weights": weights, "size_bytes": size}
        for kind, (n, weights, size) in done.plan.by_type().items()
    }
    return {
        "out": None if target is None else str(target), "type": done.plan.kind, "size_bytes": done.size_bytes,
        "types": types, "notes": done.notes,
        "certificate": None if done.certificate is None else done.certificate.as_dict(),
    }  # fmt: skip


def _draw(done: Quantized) -> None:
    """The plan as a table on stdout: how much there is of each type."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from edgelora.cli.display import output

    table = Table("type", "tensors", "weights", "bits each", "size", box=SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    found = done.plan.by_type()
    everything = tuple(map(sum, zip(*found.values(), strict=True)))
    for name, (n, weights, n_bytes) in [*((k.name, row) for k, row in found.items()), ("in all", everything)]:
        table.add_row(name, f"{n:,}", f"{weights:,}", f"{8 * n_bytes / weights:.2f}", size(n_bytes))
    console = output()
    console.print(table)
    console.print(f"{done.plan.kind}: the file will have {done.size_bytes:,} bytes", soft_wrap=True)
