"""`edgelora generate`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgelora.cli.arguments import GGUFBase, Json, Unverified
from edgelora.cli.running import Attach, Worker, attached, engine_config, sampling_of, with_runtime_options
from edgelora.errors import ConfigError

if TYPE_CHECKING:
    from runtime.service import Piece, Request, Service, TokenLogprob, Usage

STOPPED = 130  # the exit code of Ctrl-C


@with_runtime_options
def generate(
    base: GGUFBase,
    prompt: Annotated[
        str | None, typer.Argument(help="What is asked; standard input without it, or for -.", show_default=False)
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A file with the prompt instead.", show_default=False)] = None,
    adapter: Attach = None,
    system: Annotated[str | None, typer.Option(help="A system message; the adapters' own without it.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(help="The longest answer.", min=1)] = 512,
    logprobs: Annotated[
        int | None,
        typer.Option(help="With --json: each token's log-probability, and so many others.", min=0, show_default=False),
    ] = None,
    allow_unverified_base: Unverified = False,
    worker: Worker = False,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Answer one prompt, for scripts: text as it comes, or one JSON object. The given adapters answer together.

    Example: `edgelora generate base.gguf "Lock the door" --adapter home=home.gguf:0.7`
    """
    _require_sense(raw, system, logprobs, as_json)
    from edgelora.pipeline.live import Serving, serving
    from runtime.service import Request

    text = _prompt(prompt, file)
    adapters = attached(adapter)
    sampling = replace(sampling_of(options), logprobs=logprobs)
    request = Request(text, {one.name: one.scale for one in adapters}, sampling, max_tokens)
    asked = Serving(base, adapters, engine_config(options), allow_unverified_base, worker, conversing=not raw)
    with serving(asked) as service:
        if not raw:
            request = _question(service, request, system)
        pieces, usage, stopped = _answer(service, request, aloud=not as_json)
        if as_json:
            print(json.dumps(_as_json(service, request, pieces, usage)))
    if stopped:
        raise typer.Exit(STOPPED)


def _require_sense(raw: bool, system: str | None, logprobs: int | None, as_json: bool) -> None:
    if raw and system is not None:
        raise ConfigError("--system with --raw", "a text to continue has no messages", "leave one of them out")
    if logprobs is not None and not as_json:
        raise ConfigError("--logprobs without --json", "they are not part of the text", "pass --json too")


def _prompt(argument: str | None, file: Path | None) -> str:
    """The text of the argument, the file, or standard input. Raises ConfigError, DataError for what is not UTF-8."""
    from edgelora.pipeline.tokenize import read_text, text_of_argument

    if argument is not None and file is not None:
        raise ConfigError("a prompt and --file", "one call answers one prompt", "leave one of them out")
    if argument not in (None, "-"):
        return text_of_argument(argument or "", "PROMPT")
    if file is None and argument is None and sys.stdin.isatty():
        raise ConfigError(
            what="no prompt",
            why="it is an argument, a --file or standard input, and this is a terminal",
            fix="pass it behind the base, or - to type it and end with Ctrl-D",
        )
    return read_text(file or Path("-"))


def _question(service: Service, request: Request, system: str | None) -> Request:
    """The text as a user's message, asked as these adapters were trained to be."""
    from runtime.chat import one_question

    infos = [service.adapters[name] for name, scale in request.adapters.items() if scale]
    return replace(request, prompt=one_question(str(request.prompt), infos, system))


def _answer(service: Service, request: Request, *, aloud: bool) -> tuple[list[Piece], Usage | None, bool]:
    """The pieces, what they cost, and whether Ctrl-C stopped them."""
    from edgelora.cli.display import output
    from runtime.reading import read
    from runtime.shown import visible

    pieces: list[Piece] = []
    out = output()
    stream, stopped = service.generate(request), False
    try:
        for piece in read(stream):
            pieces.append(piece)
            if aloud and piece.text:
                out.file.write(visible(piece.text) if out.is_terminal else piece.text)
                out.file.flush()
    except KeyboardInterrupt:
        stopped = True
    if aloud and not (pieces and "".join(piece.text for piece in pieces).endswith("\n")):
        print()
    return pieces, stream.usage, stopped


def _as_json(service: Service, request: Request, pieces: list[Piece], usage: Usage | None) -> dict[str, Any]:
    known = service.adapters
    made: dict[str, Any] = {
        "text": "".join(piece.text for piece in pieces),
        "tokens": [token for piece in pieces for token in piece.tokens],
        "finish": usage.finish if usage else None,
        "usage": asdict(usage) if usage else None,
        "adapters": {name: {"digest": known[name].digest, "scale": scale} for name, scale in request.adapters.items()},
    }
    if request.sampling.logprobs is None:
        return made
    return made | {"logprobs": [_logprob(one) for piece in pieces for one in piece.logprobs]}


def _logprob(one: TokenLogprob) -> dict[str, Any]:
    """A piece of a character is written with `\\xNN` for its bytes."""
    return {
        "token": one.token, "text": one.text.decode("utf-8", "backslashreplace"), "logprob": one.logprob,
        "top": [{"token": token, "logprob": logprob} for token, logprob in one.top],
    }  # fmt: skip
