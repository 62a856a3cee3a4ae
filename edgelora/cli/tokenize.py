"""`edgelora tokenize`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgelora.cli.arguments import Base, Json
from edgelora.errors import ConfigError
from edgelora.words import count, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from edgelora.base.model import Base as OpenBase
    from edgelora.pipeline.tokenize import Token, Tokenized

MOST_SHOWN = 2000  # tokens, on a terminal
SPECIAL, LEARNED = "bold magenta", "green underline"


def tokenize(
    base: Base,
    text: Annotated[str | None, typer.Option(help="A text.", show_default=False)] = None,
    file: Annotated[Path | None, typer.Option(help="A text file; - is standard input.", show_default=False)] = None,
    chat: Annotated[
        Path | None, typer.Option(help="Rows as for training: JSONL; - is standard input.", show_default=False)
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="For a base without one: chatml, or a Jinja file.", show_default=False)
    ] = None,
    parse_special: Annotated[
        bool, typer.Option("--parse-special", help="Read special tokens out of the text; else they are plain text.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Compare every id with llama.cpp's own tokenizer.")] = False,
    as_json: Json = False,
) -> None:
    """Show the token ids of a text, or of conversations as they are trained, and compare them with llama.cpp's.

    Example: `edgelora tokenize base.gguf --text "Hello, world" --check`
    """
    _require_one_source(text, file, chat, parse_special, chat_template)
    from edgelora.base.model import open_base
    from edgelora.cli.display import listener
    from edgelora.pipeline import tokenize as pipeline
    from edgelora.progress import Progress, silent

    opened = open_base(base, chat_template)
    if chat is not None:
        n_rows, rows = pipeline.tokenize_chats(opened, chat)
    else:
        said = pipeline.read_text(file) if file is not None else pipeline.text_of_argument(text or "", "--text")
        n_rows, rows = 1, iter([pipeline.tokenize_text(opened, said, parse_special=parse_special)])
    with listener(as_json) as display:
        on_progress = display.show if n_rows > 1 else silent
        whole, compared = [], None
        for row in rows if check or as_json else ():
            whole.append(row)
            on_progress(Progress("tokenize", len(whole), n_rows))
        if check:
            compared = pipeline.check(opened, whole, parse_special=parse_special, on_progress=on_progress)
    if as_json:
        print(json.dumps({"base": str(base), "rows": [_as_json(opened, row) for row in whole], "compared": compared}))
        return
    _print(opened, whole or rows, n_rows)
    if compared is not None:
        display.say(f"llama.cpp gives the same {count(compared, 'id')}")


def _require_one_source(
    text: str | None, file: Path | None, chat: Path | None, parse_special: bool, chat_template: str | None
) -> None:
    given = [f"--{name}" for name, value in (("text", text), ("file", file), ("chat", chat)) if value is not None]
    if len(given) != 1:
        raise ConfigError(
            what=f"{' and '.join(given) or 'nothing'} to tokenize",
            why="one call shows one text, or one file of rows",
            fix="pass one of --text TEXT, --file FILE (- is standard input) and --chat ROWS.jsonl",
        )
    if parse_special and chat is not None:
        raise ConfigError(
            what="--parse-special with --chat",
            why="in a conversation the special tokens are those that the template writes, and no others",
            fix="leave it out",
        )
    if chat_template is not None and chat is None:
        raise ConfigError(
            what=f"--chat-template with {given[0]}",
            why="a text is tokenized as it stands",
            fix="leave it out, or pass rows with --chat",
        )


def _as_json(base: OpenBase, row: Tokenized) -> dict[str, Any]:
    """A piece that is no whole character is written with `\\xNN` for its bytes."""
    from edgelora.pipeline.tokenize import tokens_of

    tokens = list(tokens_of(base, row))
    found: dict[str, Any] = {
        "n_tokens": len(tokens), "n_bytes": len(row.text.encode()), "ids": row.ids,
        "pieces": [token.piece.decode("utf-8", "backslashreplace") for token in tokens],
        "special": [token.special for token in tokens],
    }  # fmt: skip
    return found if row.learned is None else {"prompt": row.text, **found, "loss_mask": row.learned}


# -- as text ------------------------------------------------------------------------------------------------------


def _print(base: OpenBase, rows: Iterable[Tokenized], n_rows: int) -> None:
    """On a terminal pieces above their ids, up to MOST_SHOWN; elsewhere all tokens for another program."""
    from edgelora.cli.display import output

    console = output()
    if console.is_terminal:
        _print_pieces(base, rows, n_rows, console)
    else:
        _print_lines(base, rows)


def _print_lines(base: OpenBase, rows: Iterable[Tokenized]) -> None:
    """A token a line, and an empty line between conversations."""
    from edgelora.pipeline.tokenize import tokens_of

    for number, row in enumerate(rows, 1):
        if number > 1:
            print()
        for token in tokens_of(base, row):
            print(_line(token))
        print(_heading(base, row, number), file=sys.stderr)


def _print_pieces(base: OpenBase, rows: Iterable[Tokenized], n_rows: int, console: Console) -> None:
    from edgelora.pipeline.tokenize import tokens_of

    room = MOST_SHOWN
    for number, row in enumerate(rows, 1):
        console.print(_heading(base, row, number), style="bold", markup=False)
        for line in _two_lines(tokens_of(base, row, room), console.width):
            console.print(line, no_wrap=True, overflow="ellipsis")
        room -= len(row.ids)
        if room < 0:
            console.print(f"… {count(-room, 'more token')}; --json prints all", style="yellow")
        if room <= 0 and number < n_rows:
            console.print(f"… {count(n_rows - number, 'more row')}; --json prints all", style="yellow")
            break
    if row.learned is not None:
        console.print(_legend())


def _heading(base: OpenBase, row: Tokenized, number: int) -> str:
    if row.learned is None:
        return _summary(base, row)
    return f"row {number}: {count(len(row.ids), 'token')}, {sum(row.learned):,} with loss"


def _summary(base: OpenBase, row: Tokenized) -> str:
    """What a text came to, and what `encode` leaves out."""
    n_bytes, t = len(row.text.encode()), base.tokenizer
    parts = [f"{count(len(row.ids), 'token')} for {count(n_bytes, 'byte')}"]
    if row.ids:
        parts.append(f"{n_bytes / len(row.ids):.2f} bytes a token")
    if t.add_bos and t.bos_id is not None:
        parts.append(f"a prompt begins with {visible(t.text_of(t.bos_id))} ({t.bos_id}) besides")
    return "; ".join(parts)


def _two_lines(tokens: Iterable[Token], width: int) -> Iterator[Text]:
    """Pieces above their ids, in lines that end at `width` and at the text's own ends of lines."""
    from rich.cells import cell_len
    from rich.text import Text

    above, below = Text(), Text()
    for token in tokens:
        piece, style = visible(token.piece, blank="␣"), _style(token)
        room = max(cell_len(piece), len(str(token.id)))
        if above and above.cell_len + room >= width:
            yield from (above, below)
            above, below = Text(), Text()
        above.append(piece, style).append(" " * (room - cell_len(piece) + 1))
        below.append(f"{token.id:<{room}} ", "dim")
        if token.piece.endswith(b"\n"):
            yield from (above, below)
            above, below = Text(), Text()
    if above:
        yield from (above, below)


def _line(token: Token) -> str:
    """`4093<TAB>"user"`, and what is to be said of the token."""
    marks = [name for name, is_so in (("special", token.special), ("loss", token.learned)) if is_so]
    return "\t".join([str(token.id), f'"{visible(token.piece)}"', *marks])


def _style(token: Token) -> str:
    return " ".join(style for style, is_so in ((SPECIAL, token.special), (LEARNED, token.learned)) if is_so)


def _legend() -> Text:
    from rich.text import Text

    return Text.assemble(("special, by the template", SPECIAL), "  ", ("with loss", LEARNED), "  without loss")
