"""A chat on a terminal, or through pipes: reads lines, answers them, carries out commands."""

from __future__ import annotations

import contextlib
import io
import sys
import termios
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgelora.errors import EdgeloraError
from runtime.chat import Chat
from runtime.commands import Answers, Facts, Reply, run_command, who_answers
from runtime.line_input import LineInput, PipedInput
from runtime.shown import show_answer, show_side_by_side, visible


@dataclass
class Terminal:
    """Where a chat is shown. Talk goes to `out`, and only errors to `errors`."""

    out: Console
    errors: Console

    @classmethod
    def standard(cls) -> Terminal:
        """Standard output and error; a character that their encoding lacks is written as an escape."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        return cls(Console(highlight=False), Console(stderr=True, highlight=False))

    def say(self, line: str) -> None:
        self.out.print(Text(visible(line)), soft_wrap=not self.out.is_terminal)

    def show(self, reply: Reply) -> None:
        """What a command has to say; answers as they come."""
        if isinstance(reply, Answers):
            with _keys_unheard(sys.stdin):
                if len(reply.streams) == 1:
                    show_answer(self.out, reply.streams[0][1])
                else:
                    show_side_by_side(self.out, reply.streams)
        elif isinstance(reply, Facts):
            self.out.print(self._table(reply), soft_wrap=not self.out.is_terminal)
        elif reply is not None:
            self.say(reply)

    def fault(self, error: EdgeloraError) -> None:
        self.errors.print(Text(f"error: {error}", "red"), soft_wrap=not self.errors.is_terminal)

    def _table(self, facts: Facts) -> Table | Text:
        """Two columns; elsewhere than on a terminal a row is a line, however long."""
        if not self.out.is_terminal:
            width = max(len(name) for name, _ in facts.rows)
            return Text("\n".join(f"{name:<{width}}  {said}" for name, said in facts.rows))
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(style="bold", max_width=max(12, self.out.width // 3), overflow="fold")
        table.add_column(overflow="fold")
        for name, said in facts.rows:
            table.add_row(Text(visible(name)), Text(visible(said)))
        return table


def talk(chat: Chat, history: Path | None = None) -> None:
    """Read lines and answer them until /quit or the end of input. Ctrl-C stops an answer, not the program.

    history: a file that keeps what was typed, for the next time; None keeps it for this time alone.
    """
    terminal = Terminal.standard()
    lines: LineInput | PipedInput = PipedInput()
    if sys.stdin.isatty() and sys.stdout.isatty():
        lines = LineInput(chat, history)
    service = chat.service
    n_threads = service.threads.value
    terminal.say(f"{service.name}, {n_threads} thread{'s' * (n_threads != '1')} ({service.threads.why})")
    terminal.say(who_answers(chat))
    terminal.say("/help shows the commands, /quit ends the chat\n")
    while True:
        try:
            line = lines.read()
        except EOFError:
            return
        except KeyboardInterrupt:
            terminal.say("/quit ends the chat")
            continue
        if line and not answer(terminal, chat, line):
            return


def answer(terminal: Terminal, chat: Chat, line: str) -> bool:
    """Carry out a command or answer a question; false if that was the end."""
    try:
        reply = run_command(chat, line) if line.startswith("/") else Answers([("", chat.ask(line))])
        if reply is None:
            return False
        terminal.show(reply)
        if isinstance(reply, Answers):
            _say_how_it_ended(terminal, chat)
    except EdgeloraError as e:
        terminal.fault(e)
    except KeyboardInterrupt:
        terminal.say("… stopped")
    sys.stdout.flush()
    return True


def _say_how_it_ended(terminal: Terminal, chat: Chat) -> None:
    """Where it was not by the model's own word."""
    if terminal.out.is_terminal and chat.usage is not None:
        if chat.usage.finish == "length":
            terminal.say("… ended by the limit of tokens, or of the context")
        elif not chat.usage.generated_tokens:
            terminal.say("… no answer")


@contextlib.contextmanager
def _keys_unheard(keyboard: TextIO) -> Iterator[None]:
    """What is typed while an answer comes is not mixed into it; it stands in the next line to edit."""
    if not keyboard.isatty():
        yield
        return
    before = termios.tcgetattr(keyboard)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(keyboard, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSANOW, before)
