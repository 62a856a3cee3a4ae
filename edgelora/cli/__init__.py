"""The command line: each command reads its arguments, calls one function and prints. Heavy imports stay inside."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from itertools import takewhile
from typing import Any

import typer

from edgelora.cli import adapters, data, evaluate, export, inspect, look, plan, tokenize, train
from edgelora.cli.add_tokens import add_tokens
from edgelora.cli.as_events import Refused, warnings_as_notes, wrong_usage
from edgelora.cli.chat import chat
from edgelora.cli.compare import compare
from edgelora.cli.compose import compose
from edgelora.cli.convert import convert
from edgelora.cli.generate import generate
from edgelora.cli.imatrix import imatrix
from edgelora.cli.import_ import import_
from edgelora.cli.merge import merge
from edgelora.cli.methods import methods
from edgelora.cli.perplexity import perplexity
from edgelora.cli.quantize import quantize
from edgelora.cli.report import report
from edgelora.cli.residual import residual
from edgelora.cli.state import state
from edgelora.cli.terminal import Outliving
from edgelora.cli.untie import untie
from edgelora.errors import EdgeloraError

app = typer.Typer(
    name="edgelora",
    help="Fine-tune a language model on your own machine, over the very GGUF file that llama.cpp will run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

app.command()(look.quickstart)
app.command()(train.train)
app.command()(plan.plan)
app.command()(methods)
app.command()(convert)
app.command()(export.export)
app.command(name="import")(import_)
app.command()(merge)
app.command()(compose)
app.command()(imatrix)
app.command()(quantize)
app.command()(residual)
app.command()(untie)
app.command(name="add-tokens")(add_tokens)
app.command(name="eval")(evaluate.evaluate)
app.command()(perplexity)
app.command()(report)
app.command()(compare)
app.command()(chat)
app.command()(generate)
app.command()(inspect.inspect)
app.command()(tokenize.tokenize)
app.add_typer(adapters.app, name="adapters")
app.add_typer(data.app, name="data")
app.command()(look.doctor)


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the Python traceback of an error."),
) -> None:
    state.debug = debug


def run(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code. An error is told in three lines: what, why, fix; or as JSON."""
    words = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in takewhile("--".__ne__, words)
    try:
        with warnings_as_notes() if as_json else nullcontext():
            code = _called(words, as_json)
    except Refused as e:
        _tell(wrong_usage(e), "", as_json)
        return e.exit_code
    except EdgeloraError as e:
        if state.debug:
            raise
        Outliving.stopping = e.exit_code > 128
        _tell(e, f"{e}" if e.exit_code > 128 else f"error: {e}", as_json)
        return e.exit_code
    except MemoryError as e:
        if state.debug:
            raise
        said = f"there was not enough memory{f' ({e})' if str(e) else ''}"
        error = EdgeloraError(
            said, "the machine or a limit (`ulimit -v`) has no more", "free some, or give it less to do"
        )
        _tell(error, f"error: {error}", as_json)
        return error.exit_code
    if code == 130:  # typer's own: stopped by Ctrl-C
        Outliving.stopping, line = True, "stopped; what was not finished was not written"
        _tell(EdgeloraError(line, "Ctrl-C", "give the same command again"), f"\n{line}", as_json)
    return code if isinstance(code, int) else int(code is not None)


def _called(words: list[str], as_json: bool) -> Any:
    """What the command ended with, once all that it said is out."""
    try:
        code = app(words, standalone_mode=not as_json)  # standing alone, typer draws what is wrong usage
    except SystemExit as e:
        code = e.code
    try:
        if sys.stdout is not None:  # as it is behind `>&-`
            sys.stdout.flush()  # what cannot be written is an error while there is somebody to tell
    except BrokenPipeError:
        return code or 1  # as typer has it, which is not always there to see it
    return code


def _tell(error: EdgeloraError, text: str, as_json: bool) -> None:
    """The end of a command that did not come to its own, on stderr: `text` for people, an event for programs."""
    if as_json:
        from edgelora.cli.display import JsonLines

        JsonLines().error(error)
    else:
        print(text, file=sys.stderr)
