"""`edgelora adapters`: those that have a name in the user's home, for chat and generate to be called by."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgelora.cli.arguments import Json
from edgelora.words import size, visible

if TYPE_CHECKING:
    from runtime.store import About, Stored

Name = Annotated[str, typer.Argument(help="The name of a stored adapter.", show_default=False)]

app = typer.Typer(help="Keep adapters under names.", no_args_is_help=True)


@app.command(name="list")
def list_(as_json: Json = False) -> None:
    """The stored adapters, by name.

    Example: `edgelora adapters list`
    """
    from runtime.store import Store

    stored = Store().all()
    if as_json:
        print(json.dumps([adapter.as_dict() for adapter in stored]))
    elif stored:
        _draw(stored)
    else:
        print("none yet; add one: edgelora adapters add FILE.gguf")


@app.command()
def add(
    file: Annotated[Path, typer.Argument(help="A GGUF adapter, as `edgelora export` writes it.", show_default=False)],
    name: Annotated[
        str | None, typer.Option(help="What to call it. Default: the file's own name.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Let the name stand for this adapter now.")] = False,
    as_json: Json = False,
) -> None:
    """Check an adapter and keep a copy of it under a name; the same content is kept once.

    Example: `edgelora adapters add home.gguf --name home`
    """
    from runtime.names import stored_name_of
    from runtime.store import Store

    _show(Store().add(name or stored_name_of(file), file, overwrite=overwrite), as_json)


@app.command()
def show(name: Name, as_json: Json = False) -> None:
    """What is known of a stored adapter: its base, method, rank, system message and scores.

    Example: `edgelora adapters show home`
    """
    from runtime.store import Store

    _show(Store().get(name), as_json)


@app.command()
def remove(name: Name, as_json: Json = False) -> None:
    """Take a name away, and the file with the last name it had.

    Example: `edgelora adapters remove home`
    """
    from runtime.store import Store

    Store().remove(name)
    if as_json:
        print(json.dumps({"removed": name}))
    else:
        print(f"{name} is no longer stored")


def _draw(stored: list[Stored]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from edgelora.cli.display import output

    table = Table("name", "size", "rank", "method", "trained over", "added", box=SIMPLE_HEAD, pad_edge=False)
    for adapter in stored:
        about = adapter.about
        cells = (adapter.name, _size(about), _ranks(about), about.method, _base(about), adapter.added[:10])
        table.add_row(*(Text(visible(cell)) for cell in cells))
    output().print(table)


def _show(stored: Stored, as_json: bool) -> None:
    if as_json:
        print(json.dumps(stored.as_dict()))
        return
    from rich.text import Text

    from edgelora.cli.display import output

    console = output()
    for label, value in _lines(stored):
        console.print(Text.assemble((f"{label:<12}", "bold"), visible(value)), soft_wrap=True)


def _lines(stored: Stored) -> Iterator[tuple[str, str]]:
    about = stored.about
    yield "name", f"{stored.name}, added {stored.added}"
    yield "file", f"{stored.path}, {_size(about)}"
    yield "method", f"{about.method}, rank {_ranks(about)}"
    yield "base", _base(about) + (f", identity {about.base}" if about.base else "")
    if about.system:
        yield "system", about.system
    if about.single_turn:
        yield "turns", "each question by itself"
    for kind, scores in about.scores.items():
        yield kind, ", ".join(_score(key, value) for key, value in scores.items())


def _score(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"{key} (" + ", ".join(_score(*item) for item in value.items()) + ")"
    return f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"


def _size(about: About) -> str:
    return f"{size(about.size_bytes)}"


def _ranks(about: About) -> str:
    return "/".join(map(str, about.ranks))


def _base(about: About) -> str:
    return f"{about.base_name} ({about.base_quant})" if about.base_name else "not named: made elsewhere"
