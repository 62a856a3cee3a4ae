"""Arguments that several commands share, and how their text is read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from edgelora.errors import ConfigError

Base = Annotated[
    Path, typer.Argument(help="The base model: a .gguf file, or a Hugging Face folder.", show_default=False)
]
Out = Annotated[Path, typer.Option(help="Where the result goes.", show_default=False)]
Imatrix = Annotated[
    Path | None, typer.Option(help="An importance matrix, as `edgelora imatrix` writes it.", show_default=False)
]
PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan", help="The type of each tensor, as `edgelora quantize --save-plan` wrote it.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what stands at --out.")]
GGUFBase = Annotated[Path, typer.Argument(help="The base model: a .gguf file.", show_default=False)]
Engine = Annotated[
    str, typer.Option("--in", help="llama.cpp, or torch, which is taken for folders (a checkpoint, an adapter's own).")
]
CheckData = Annotated[
    Path | None, typer.Option("--data", help="Rows to check with; a few built-in ones without it.", show_default=False)
]
CHECKED_ROWS = 64
CheckRows = Annotated[int, typer.Option("--check-rows", min=1, help="How many rows of --data are compared.")]
For = Annotated[
    str | None,
    typer.Option("--for", help="Write what ollama, lmstudio or llama-server needs beside it.", show_default=False),
]
Unverified = Annotated[
    bool, typer.Option("--allow-unverified-base", help="Accept an adapter that does not name its base.")
]


def scaled(text: str) -> tuple[Path, float]:
    """`folder:0.5` → (folder, 0.5); without a number the scale is 1."""
    path, colon, number = text.rpartition(":")
    try:
        scale = float(number) if colon else None
    except ValueError:
        scale = None
    if scale is None:
        return Path(text), 1.0
    if not math.isfinite(scale):
        raise ConfigError(
            what=f"--adapter {text}: {number} is no scale",
            why="it multiplies the adapter's weights",
            fix="write a number, such as FOLDER:0.5",
        )
    return Path(path), scale


def named(text: str) -> tuple[str, Path]:
    """`home=home.gguf` → (home, path); without a name the file's own is taken, blanks and signs replaced by `-`."""
    from runtime.names import TYPED, name_of

    name, equals, path = text.partition("=")
    if not equals or Path(text).is_file():
        name, path = name_of(Path(text)), text
    if not TYPED.fullmatch(name):
        raise ConfigError(
            what=f"--adapter {text}: {name or 'an empty text'} is no name for an adapter",
            why="you type it in chat: letters, digits, '-', '_' and '.' are allowed",
            fix="write --adapter NAME=FILE",
        )
    return name, Path(path)
