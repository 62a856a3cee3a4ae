"""THE TABLE of what one can type in a chat besides questions. One function and one row for a new command."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from edgelora.errors import ConfigError
from runtime.chat import ONE_BY_ONE, Chat
from runtime.names import BASE, name_of, read_scale, require_name, scaled_name
from runtime.settings import OFF, values, with_setting
from runtime.store import Store
from runtime.transcript import read_transcript, write_transcript


@dataclass(frozen=True)
class Facts:
    """Rows of a name and what is to be said of it."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Answers:
    """Answers to be shown side by side, each under its title; a single one has none."""

    streams: Sequence[tuple[str, Iterator[str]]]


Reply = str | Facts | Answers | None
"""What a command has to say; None ends the chat."""
Argument = Literal["adapters", "compared", "stored", "file", "setting", "nothing"]


@dataclass(frozen=True)
class Command:
    """`words`: what follows the name, as help shows it. `run` gets the rest of the line; it raises EdgeloraError."""

    words: str
    help: str
    run: Callable[[Chat, str], Reply]
    argument: Argument = "nothing"
    """What a word that follows may be completed to."""


def run_command(chat: Chat, line: str) -> Reply:
    """Carry out a line that begins with `/`. Raises EdgeloraError; the chat is then as it was."""
    name, _, rest = line.partition(" ")
    if name not in COMMANDS:
        near = [f"/{one}" for one in difflib.get_close_matches(name[1:], [known[1:] for known in COMMANDS], 1)]
        raise ConfigError(
            what=f"{name}: no such command" + (f", did you mean {near[0]}?" if near else ""),
            why="a line that begins with / is a command",
            fix="/help shows them all",
        )
    return COMMANDS[name].run(chat, rest.strip())


# -- adapters -----------------------------------------------------------------------------------------------------


def who_answers(chat: Chat) -> str:
    """`answering with home at 0.7, poet at 1`."""
    named = ", ".join(name if scale == 1 else f"{name} at {scale:g}" for name, scale in chat.active.items())
    return f"answering with {named or 'the base alone'}{ONE_BY_ONE if chat.single_turn else ''}"


def _use(chat: Chat, rest: str) -> Reply:
    wanted = [_named(chat, word) for word in _words("/use", rest, 1, None)]
    if len(dict(wanted)) < len(wanted):
        raise ConfigError(f"/use {rest}: a name twice", "an adapter has one scale", "name each once")
    chat.use({name: scale for name, scale in wanted if name != BASE})
    return who_answers(chat)


def _named(chat: Chat, word: str) -> tuple[str, float]:
    """`home:0.7`, or `home` at the scale it was attached with."""
    name, scale = scaled_name(word)
    return name, chat.scale_of(name) if scale is None else scale


def _adapter(chat: Chat, rest: str) -> Reply:
    name, *scale = _words("/adapter", rest, 1, 2)
    chat.use({name: read_scale(scale[0]) if scale else chat.scale_of(name)})
    return who_answers(chat)


def _base(chat: Chat, rest: str) -> Reply:
    _words("/base", rest, 0, 0)
    chat.use({})
    return who_answers(chat)


def _adapters(chat: Chat, rest: str) -> Reply:
    _words("/adapters", rest, 0, 0)
    known = chat.service.adapters
    if not known:
        return "no adapters are loaded; /load FILE NAME loads one"
    return Facts([
        (
            f"{'*' if name in chat.active else ' '} {name}",
            f"{f'at {chat.active[name]:g}, ' if name in chat.active else ''}"
            f"{adapter.size_bytes / 1e6:.1f} MB, {adapter.path}",
        )
        for name, adapter in known.items()
    ])  # fmt: skip


def _load(chat: Chat, rest: str) -> Reply:
    file, *named = _words("/load", rest, 1, 2)
    name = require_name(named[0] if named else name_of(Path(file)))
    path = Store().resolve(str(Path(file).expanduser()))
    chat.service.load(name, path, allow_unverified=chat.settings.allow_unverified)
    return f"loaded {name}" + ("" if name in chat.active else f"; /use {name} answers with it")


def _unload(chat: Chat, rest: str) -> Reply:
    (name,) = _words("/unload", rest, 1, 1)
    chat.unload(name)
    return f"unloaded {name}; {who_answers(chat)}"


# -- answers ------------------------------------------------------------------------------------------------------


def _compare(chat: Chat, rest: str) -> Reply:
    parts = rest.split(maxsplit=2)
    one, other = _words("/compare", " ".join(parts[:2]), 2, 2)
    text = parts[2] if len(parts) > 2 else None
    sets = [(word, _set_of(chat, word)) for word in (one, other)]  # both are there before one is asked
    return Answers([(word, chat.compare(adapters, text)) for word, adapters in sets])


def _set_of(chat: Chat, word: str) -> dict[str, float]:
    return {} if word == BASE else chat.checked(dict([_named(chat, word)]))


def _retry(chat: Chat, rest: str) -> Reply:
    _words("/retry", rest, 0, 0)
    return Answers([("", chat.retry())])


def _undo(chat: Chat, rest: str) -> Reply:
    _words("/undo", rest, 0, 0)
    return f"taken back: {chat.undo()}"


def _reset(chat: Chat, rest: str) -> Reply:
    _words("/reset", rest, 0, 0)
    chat.reset()
    return "the conversation starts anew"


# -- settings and files -------------------------------------------------------------------------------------------


def _system(chat: Chat, rest: str) -> Reply:
    chosen = {"": chat.settings.system, "auto": None, OFF: ""}.get(rest, rest)
    chat.settings = replace(chat.settings, system=chosen)
    if chat.settings.system is None:
        return f"system: {chat.system or 'what the chat template says'} (with the adapters; /system TEXT sets another)"
    return f"system: {chat.system or 'none'} (/system auto follows the adapters)"


def _set(chat: Chat, rest: str) -> Reply:
    name, _, value = rest.partition(" ")
    if not value.strip() and (not name or name in values(chat.settings)):
        return Facts([row for row in values(chat.settings).items() if name in ("", row[0])])
    chat.settings = with_setting(chat.settings, name, value)
    return f"{name} is {values(chat.settings)[name]}"


def _stats(chat: Chat, rest: str) -> Reply:
    _words("/stats", rest, 0, 0)
    used = chat.usage
    if used is None:
        return "nothing was answered yet"
    fresh = used.prompt_tokens - used.reused_tokens
    return Facts([
        ("prompt", f"{used.prompt_tokens} tokens, {used.reused_tokens} reused{_speed(fresh, used.prompt_seconds)}"),
        ("answer", f"{used.generated_tokens} tokens{_speed(used.generated_tokens, used.generation_seconds)}"),
        ("first token", f"after {used.first_token_seconds:.2f} s"),
        ("ended by", {"stop": "the model", "length": "the limit of tokens", "cancelled": "you"}[used.finish]),
        ("KV cache", f"{used.kv_bytes / 1e6:.1f} MB"),
    ])  # fmt: skip


def _speed(tokens: int, seconds: float) -> str:
    return f", {tokens / seconds:.0f} tokens/s" if tokens and seconds > 0 else ""


def _save(chat: Chat, rest: str) -> Reply:
    (file,) = _words("/save", rest, 1, 1)
    path = Path(file).expanduser()
    n_rows = write_transcript(path, chat.messages, chat.system)
    return f"saved {len(chat.messages)} messages in {path}" + (f", as its row {n_rows}" if n_rows > 1 else "")


def _load_chat(chat: Chat, rest: str) -> Reply:
    (file,) = _words("/load-chat", rest, 1, 1)
    chat.resume(read_transcript(Path(file).expanduser()))
    return f"going on behind {len(chat.messages)} messages; the last one: {chat.messages[-1].content}"


def _help(chat: Chat, rest: str) -> Reply:  # noqa: ARG001
    _words("/help", rest, 0, 0)
    return Facts([(f"{name} {command.words}".strip(), command.help) for name, command in COMMANDS.items()])


def _quit(chat: Chat, rest: str) -> Reply:  # noqa: ARG001
    _words("/quit", rest, 0, 0)
    return None


def _words(name: str, rest: str, least: int, most: int | None) -> list[str]:
    """The words behind a command; quotes keep blanks in one. Raises ConfigError if they are too few or too many."""
    try:
        words = shlex.split(rest)
    except ValueError:
        words = []
    if len(words) < least or (most is not None and len(words) > most) or (rest and not words):
        usage = f"{name} {COMMANDS[name].words}".strip()
        raise ConfigError(
            what=f"{name} {rest}".strip() + ": too few or too many words",
            why="a command takes what is shown below; quotes keep blanks in one word",
            fix=usage,
        )
    return words


COMMANDS: dict[str, Command] = {
    "/adapters": Command("", "which adapters are loaded, and which of them answer (*)", _adapters),
    "/use": Command("NAME[:SCALE] …", "answer with these adapters from now on", _use, "adapters"),
    "/adapter": Command("NAME [SCALE]", "the same with one", _adapter, "adapters"),
    "/base": Command("", "answer with the base alone", _base),
    "/load": Command("FILE [NAME]", "load an adapter: a GGUF file, or one of the store by its name", _load, "stored"),
    "/unload": Command("NAME", "free an adapter", _unload, "adapters"),
    "/compare": Command(
        "NAME NAME [QUESTION]", f"two adapters side by side on the last question, or another; {BASE} is a name too",
        _compare, "compared",
    ),
    "/retry": Command("", "answer the last question again", _retry),
    "/undo": Command("", "take the last question and its answer back", _undo),
    "/reset": Command("", "start the conversation anew", _reset),
    "/system": Command("[TEXT]", f"the system message; auto: the adapters' own, {OFF}: none", _system),
    "/set": Command("[NAME [VALUE]]", "how answers are drawn: temperature 0.7, max_tokens 100 …", _set, "setting"),
    "/stats": Command("", "speed and size of the last answer", _stats),
    "/save": Command("FILE", "the conversation as a row to train on; a .jsonl file gets one more row", _save, "file"),
    "/load-chat": Command("FILE", "go on with a conversation, the last row of a file", _load_chat, "file"),
    "/help": Command("", "this list", _help),
    "/quit": Command("", "end the chat, as Ctrl-D does", _quit),
}  # fmt: skip
