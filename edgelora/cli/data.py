"""`edgelora data check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from edgelora.cli.arguments import Json
from edgelora.words import count, visible

if TYPE_CHECKING:
    from rich.console import Console

    from edgelora.pipeline.data import Checked, Shown

BAR = 40  # characters of the longest bar
LEARNED, NOT_LEARNED = "green", "dim"

app = typer.Typer(help="Look at rows of data before they are trained on.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `check` a command of its own while it is the only one."""


@app.command()
def check(
    files: Annotated[
        list[str], typer.Argument(help="Files or folders of rows, as `train` takes them.", show_default=False)
    ],
    base: Annotated[Path, typer.Option(help="The base model: a .gguf file, or a Hugging Face folder.")],
    valid: Annotated[Path | None, typer.Option(help="Held-out rows, for the overlap.", show_default=False)] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=8, help="The longest row allowed. Default: the base's context.", show_default=False),
    ] = None,
    data_format: Annotated[str, typer.Option(help="How rows are read; auto goes by their keys.")] = "auto",
    loss_on: Annotated[
        Literal["all", "last"], typer.Option(help="Which of the assistant's turns are learned.")
    ] = "all",
    chat_template: Annotated[
        str | None, typer.Option(help="For a base without one: chatml, or a Jinja file.", show_default=False)
    ] = None,
    preview: Annotated[int, typer.Option(min=0, help="Show so many rows as the model will see them.")] = 0,
    as_json: Json = False,
) -> None:
    """Count what is in rows of data, and say what is odd about it, as a base will see it.

    Example: `edgelora data check rows.jsonl --base base.gguf --preview 3`
    """
    from edgelora.base.model import open_base
    from edgelora.cli.display import listener, output
    from edgelora.pipeline.data import Ask, check_data

    paths = _paths(files)
    opened = open_base(base, chat_template)
    with listener(as_json) as display:
        ask = Ask(max_length, data_format, loss_on, preview)
        found = check_data(opened, paths, valid, ask, display.show)
    if as_json:
        print(json.dumps(_as_json(found)))
    else:
        _print(found, output())
    found.raise_faults()


def _paths(files: list[str]) -> list[Path]:
    """Those of `rows.jsonl` and `rows.jsonl:0.5`: each row counts once, whatever its weight in a mix.

    Raises ConfigError for a weight that cannot be.
    """
    from pydantic import TypeAdapter, ValidationError

    from edgelora.config import Sources
    from edgelora.errors import ConfigError

    try:
        return [source.path for source in TypeAdapter(Sources).validate_python(files)]
    except ValidationError as e:
        raise ConfigError(
            what=e.errors()[0]["msg"].removeprefix("Value error, "),
            why="it is how often each row is seen in an epoch: 2 is twice, 0.5 a random half",
            fix="leave it out: each row counts once here",
        ) from e


def _as_json(found: Checked) -> dict[str, object]:
    return {
        "max_length": found.max_length,
        **found.check.as_dict(),
        "valid": None if found.valid is None else found.valid.as_dict(),
        "preview": [
            {"place": row.place, "examples": [[[p.text, p.learned] for p in parts] for parts in row.examples]}
            for row in found.shown
        ],
    }


def _print(found: Checked, console: Console) -> None:
    """What was counted, then what is odd, then the rows that were asked for."""
    from rich.text import Text

    for line in _lines(found):
        console.print(Text(line), soft_wrap=True)
    of_valid = () if found.valid is None else found.valid.warnings
    for warning in (*found.check.warnings, *(f"held-out: {warning}" for warning in of_valid)):
        console.print(Text.assemble(("! ", "yellow"), warning), soft_wrap=True)
    for row in found.shown:
        _print_row(row, console)


def _lines(found: Checked) -> list[str]:
    c = found.check
    lines = [
        f"format    {c.kinds}",
        f"rows      {c.rows:,}" + ("" if found.valid is None else f", held-out {found.valid.rows:,}"),
        f"tokens    {c.tokens:,}, of which {c.loss_share:.1%} are learned ({c.loss_tokens:,})",
        f"answers   {c.one_token:,} of one token",
        f"too long  {count(c.cut, 'row')} over {found.max_length:,} tokens"
        + (f": --truncate takes {count(c.lost_tokens, 'token')}, {count(c.lost_turns, 'whole answer')} "
           f"and the end of {c.lost_ends:,}" if c.cut else ""),
        "tokens of a row",
    ]  # fmt: skip
    bars = found.histogram
    most, width = max(n for _, _, n in bars), len(f"{bars[-1][1]:,}")
    for low, high, n in bars:
        lines.append(f"{low:>{width},} – {high:>{width},}  {'█' * -(-n * BAR // most)} {n:,}")
    return lines


def _print_row(row: Shown, console: Console) -> None:
    """Learned tokens are coloured on a terminal, and stand between ⟦ and ⟧ elsewhere."""
    from rich.text import Text

    console.print(Text(f"\n{row.place} ({row.format})", "bold"), soft_wrap=True)
    for parts in row.examples:
        text = Text()
        for part in parts:
            said = "\n".join(visible(line) for line in part.text.split("\n"))
            if console.is_terminal:
                text.append(said, LEARNED if part.learned else NOT_LEARNED)
            else:
                text.append(f"⟦{said}⟧" if part.learned else said)
        console.print(text, soft_wrap=True)
