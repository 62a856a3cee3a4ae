"""A conversation on the terminal with one engine: streams answers, switches adapters by slash commands."""

from __future__ import annotations

import codecs
import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from edgelora.data.conversation import Message
from edgelora.data.encode import encode_prompt
from edgelora.errors import ConfigError, EdgeloraError
from runtime.scorer import ScoringEngine as Engine

ONE_BY_ONE = ", each question by itself (it was trained on single turns)"
HELP = "/adapter NAME [scale]  /adapters  /base  /reset  /quit"


@dataclass(frozen=True)
class Settings:
    """How answers are drawn. `system`: a message before the conversation; None takes the one that the
    active adapter was trained with, else the template's own."""

    system: str | None = None
    temperature: float = 0.0
    max_tokens: int = 512
    seed: int = 0


class Chat:
    """The state of one conversation. `lines` are what a command has to say; `ask` streams an answer."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.messages: list[Message] = []

    def ask(self, text: str) -> Iterator[str]:
        """Answer `text` piece by piece; whole characters only. The turn is kept when the answer ends or is broken off.

        An answer that fails leaves the conversation as it was.
        """
        text_of_system = self._system()
        system = [Message("system", text_of_system)] if text_of_system else []
        base = self.engine.base
        asked = [*self.messages, Message("user", text)]
        said = asked[-1:] if self.single_turn else asked
        prompt = encode_prompt([*system, *said], base.tokenizer, base.template)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        parts: list[str] = []
        tokens = self.engine.stream(
            prompt, self.settings.max_tokens, self.settings.temperature, self.settings.seed + len(self.messages)
        )
        try:
            for token in tokens:
                if piece := decoder.decode(self.engine.model.piece(token)):
                    parts.append(piece)
                    yield piece
            if rest := decoder.decode(b"", final=True):
                parts.append(rest)
                yield rest
        finally:
            if parts:
                self.messages = [*asked, Message("assistant", "".join(parts))]

    @property
    def single_turn(self) -> bool:
        """Whether the active adapters have only seen questions that stand alone: earlier turns would mislead them."""
        loaded = [self.engine.adapters[name] for name in self.engine.active]
        return bool(loaded) and all(adapter.single_turn for adapter in loaded)

    def _system(self) -> str | None:
        if self.settings.system is not None:
            return self.settings.system
        said = {self.engine.adapters[name].system for name in self.engine.active}
        return said.pop() if len(said) == 1 else None

    def command(self, line: str) -> str | None:
        """Carry out a slash command; returns what to print, or None to end the chat. Raises EdgeloraError."""
        name, *arguments = line.split()
        commands: dict[str, Callable[..., str]] = {
            "/adapter": self._adapter,
            "/adapters": self._adapters,
            "/base": self._base,
            "/reset": self._reset,
            "/help": lambda: HELP,
        }
        if name == "/quit":
            return None
        if name not in commands:
            raise ConfigError(f"{name}: no such command", "it is not one of those below", HELP)
        try:
            inspect.signature(commands[name]).bind(*arguments)
        except TypeError as e:
            raise ConfigError(f"{line}: too few or too many words", "a command takes what is shown below", HELP) from e
        return commands[name](*arguments)

    def _adapter(self, name: str, scale: str = "1") -> str:
        try:
            number = float(scale)
        except ValueError as e:
            raise ConfigError(f"{scale} is no number", "a scale is a number such as 0.7", "/adapter NAME 0.7") from e
        self.engine.use({name: number})
        alone = ONE_BY_ONE if self.single_turn else ""
        return f"answering with {name} at {number:g}{alone}" if number else "answering with the base alone"

    def _adapters(self) -> str:
        active = self.engine.active
        lines = [
            f"{'*' if name in active else ' '} {name}{f' at {active[name]:g}' if name in active else ''}  {loaded.path}"
            for name, loaded in self.engine.adapters.items()
        ]
        return "\n".join(lines) or "no adapters are loaded; start with --adapter NAME=FILE"

    def _base(self) -> str:
        self.engine.use({})
        return "answering with the base alone"

    def _reset(self) -> str:
        self.messages = []
        return "the conversation starts anew"


def talk(chat: Chat) -> None:
    """Read lines and answer them until /quit or the end of input. Ctrl-C stops an answer, not the program."""
    engine, interactive = chat.engine, sys.stdin.isatty()
    if interactive:
        _line_editing()
    active = ", ".join(engine.active) or "the base alone"
    alone = ONE_BY_ONE if chat.single_turn else ""
    print(f"{engine.base.path.name}, {engine.threads.value} threads ({engine.threads.why})")
    print(f"answering with {active}{alone}")
    print(f"{HELP}\n", flush=True)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n/quit ends the chat")
            continue
        if not line:
            continue
        try:
            if line.startswith("/"):
                said = chat.command(line)
                if said is None:
                    return
                print(said)
            else:
                for piece in chat.ask(line):
                    print(piece, end="", flush=True)
                print()
        except EdgeloraError as e:
            print(f"error: {e}", file=sys.stderr)
        except KeyboardInterrupt:
            print(" …stopped")
        sys.stdout.flush()


def _line_editing() -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() edits lines and keeps a history once it is imported)
