"""Lines as a person types them: editing, history, completion, several lines in one; and lines out of a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.shortcuts import CompleteStyle

from edgelora.errors import EdgeloraError
from runtime.chat import Chat
from runtime.commands import COMMANDS
from runtime.names import BASE
from runtime.settings import FIELDS
from runtime.store import Store, Stored

LONGEST_PROMPT = 24  # characters of the adapters' names


class PipedInput:
    """A line at a time from standard input; a backslash at its end goes on in the next."""

    def read(self) -> str:
        """Raises EOFError at the end."""
        lines: list[str] = []
        while True:
            line = sys.stdin.readline()
            if not line and not lines:
                raise EOFError
            text = line.removesuffix("\n")
            lines.append(text.removesuffix("\\"))
            if not text.endswith("\\"):
                return "\n".join(lines).strip()


class LineInput:
    """A prompt that shows who answers. Enter sends; Alt-Enter, or Enter behind a backslash, begins another line."""

    def __init__(self, chat: Chat, history: Path | None) -> None:
        self._chat = chat
        self._session: PromptSession[str] = PromptSession(
            history=kept_in(history), completer=Completions(chat), complete_while_typing=False, multiline=True,
            key_bindings=_keys(), prompt_continuation=_continuation, complete_style=CompleteStyle.READLINE_LIKE,
            enable_history_search=True,
        )  # fmt: skip

    def read(self) -> str:
        """Raises EOFError for Ctrl-D, KeyboardInterrupt for Ctrl-C."""
        return self._session.prompt(self._prompt).strip()

    def _prompt(self) -> StyleAndTextTuples:
        names = "+".join(self._chat.active)
        if len(names) > LONGEST_PROMPT:
            names = f"{names[: LONGEST_PROMPT - 1]}…"
        return [("ansicyan", names), ("bold", " > " if names else "> ")]


def _continuation(width: int, line: int, wrapped: int) -> str:  # noqa: ARG001
    """In front of a further line; a long one that the terminal breaks has no mark there."""
    return "" if wrapped else "… "


def kept_in(path: Path | None) -> History:
    """What was typed, in a file that only its owner reads; in memory where none is named or can be written."""
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            with path.open("r+b"):
                return FileHistory(str(path))
        except OSError:
            pass
    return InMemoryHistory()


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    return keys


class Completions(Completer):
    """What Tab offers: commands, and behind them names of adapters, files or settings."""

    def __init__(self, chat: Chat) -> None:
        self._chat, self._paths = chat, PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        line = document.text_before_cursor
        if not line.startswith("/") or "\n" in line:
            return
        name, blank, rest = line.partition(" ")
        if not blank:
            yield from _beginning(name, (f"{one} " if COMMANDS[one].words else one for one in COMMANDS))
        elif name in COMMANDS:
            argument, word = COMMANDS[name].argument, rest.rpartition(" ")[2]
            if argument in ("file", "stored"):
                yield from self._paths.get_completions(Document(word), complete_event)
            yield from _beginning(word, self._words(argument, rest))

    def _words(self, argument: str, rest: str) -> Iterable[str]:
        first = " " not in rest
        if argument == "setting":
            return [f"{name} " for name in FIELDS] if first else []
        if argument == "stored":
            return [stored.name for stored in _stored()] if first else []
        loaded = self._chat.service.adapters if argument in ("adapters", "compared") else []
        return [*loaded, *([BASE] if argument == "compared" else [])]


def _stored() -> list[Stored]:
    """What the store holds; a store that cannot be read offers nothing."""
    try:
        return Store().all()
    except EdgeloraError:
        return []


def _beginning(word: str, known: Iterable[str]) -> Iterator[Completion]:
    return (Completion(one, -len(word)) for one in sorted(known) if one.startswith(word))
