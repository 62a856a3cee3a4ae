"""`edgelora add-tokens`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgelora.cli.arguments import Base, Json, Out, Overwrite
from edgelora.words import count, size, visible

Tokens = Annotated[
    list[str] | None, typer.Option("--token", help="The text of a new token (repeatable).", show_default=False)
]
FromFile = Annotated[
    Path | None,
    typer.Option(help="A file with such a text on each line; - is standard input.", show_default=False),
]
Control = Annotated[
    bool, typer.Option("--control", help="Control tokens: read where a template writes them, not out of any text.")
]

if TYPE_CHECKING:
    from edgelora.pipeline.add_tokens import Enlarged

MOST_SHOWN = 20  # of the new tokens


def add_tokens(
    base: Base,
    out: Out,
    token: Tokens = None,
    from_file: FromFile = None,
    control: Control = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a base with more tokens, for `--method token_rows` to train: all else in it stays bit for bit.

    Example: `edgelora add-tokens base.gguf --token "<tool>" --token "</tool>" --out base-tools.gguf`
    """
    from edgelora.cli.display import listener
    from edgelora.pipeline.add_tokens import add_tokens as run
    from edgelora.pipeline.tokenize import read_text, text_of_argument

    texts = [text_of_argument(text, "--token") for text in token or ()]
    if from_file is not None:
        lines = read_text(from_file).removeprefix("\ufeff").split("\n")  # a token may hold what else ends a line
        texts += [text for line in lines if (text := line.removesuffix("\r"))]
    with listener(as_json) as display:
        made = run(base, texts, out, control=control, overwrite=overwrite, on_progress=display.show)
        holds = f"{size(made.size_bytes)}, {count(made.vocab_size, 'token')}"
        padding = f" and {made.padding} padding" if made.padding else ""
        display.say(f"{out}: {holds}, {len(made.tokens)} of them new{padding}")
        for text, pieces in list(zip(made.tokens, made.pieces, strict=True))[:MOST_SHOWN]:
            display.say(f"  {made.tokens[text]} {visible(text)}: begins as the mean of {count(len(pieces), 'token')}")
        for note in made.notes:
            display.note(note)
        display.say(made.certificate.sentence)
        for step in _next_steps(made):
            display.say(step)
    if as_json:
        print(json.dumps({
            "out": str(out), "size_bytes": made.size_bytes, "vocab_size": made.vocab_size, "padding": made.padding,
            "tokens": made.tokens, "pieces": [list(pieces) for pieces in made.pieces], "notes": made.notes,
            "certificate": made.certificate.as_dict(),
        }))  # fmt: skip


def _next_steps(made: Enlarged) -> Iterator[str]:
    """What trains their rows, and before it what an adapter of them needs."""
    from edgelora.invocation import command

    named = [part for text in list(made.tokens)[:MOST_SHOWN] for part in ("--train-tokens", _typed(text, made))]
    step, over = "next: ", made.path
    if made.needs_untying:
        step, over = "then: ", made.path.with_name(f"{made.path.stem}-untied.gguf")
        yield f"next: {command('untie', made.path, '--out', over)}  (rows leave as an adapter over that alone)"
    yield step + command("train", over, "ROWS", "--method", "token_rows", *named, "--out", "ADAPTER")


def _typed(text: str, made: Enlarged) -> str:
    """How a token is named in a command: by its id where its text would be taken for one, or cannot be typed."""
    return text if text.isprintable() and not text.isdecimal() else str(made.tokens[text])
