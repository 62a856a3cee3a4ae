"""Answers on a terminal as they come: whole lines stand where they were printed, the one in work changes in place.

Markdown is styled where that takes nothing away from what the model said: headings, bold and code in a line, fenced
code, tables. Elsewhere than on a terminal an answer is printed byte for byte.
"""

from __future__ import annotations

import re
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

REDRAW_S = 0.05
NARROW = 60  # columns: below it two answers stand one above the other
Kind = Literal["line", "code", "table"]
MARKS = re.compile(r"\*\*(?=\S)(?P<bold>[^*\n]+?)(?<=\S)\*\*|`(?P<code>[^`\n]+)`")
RULE = re.compile(r"\A[^\n]*\n *\|[ :|-]*-[ :|-]*(\n|\Z)")  # the second line of a table
FENCE = re.compile(r" {0,3}(```+|~~~+)\s*([\w+#-]*)")


def visible(text: str) -> str:
    """What a terminal would obey, as an escape: a model may say anything."""
    return "".join(repr(c)[1:-1] if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


# -- an answer in parts -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A line, or all lines of a fenced block or of a table, without the end of the last one."""

    kind: Kind
    text: str


@dataclass
class Parts:
    """Cuts an answer into parts. `rest` is the part in work; what `feed` gives back will not change any more."""

    _lines: list[str] = field(default_factory=list)  # of the fenced block or table in work
    _kind: Kind = "line"
    _open: str = ""  # the line in work

    @property
    def rest(self) -> Part:
        return Part(self._kind, "\n".join([*self._lines, self._open]))

    def feed(self, text: str) -> Iterator[Part]:
        *whole, self._open = (self._open + text).split("\n")
        for line in whole:
            yield from self._take(line)

    def _take(self, line: str) -> Iterator[Part]:
        if self._kind == "table" and not line.lstrip().startswith("|"):
            yield self._end()
        if self._kind == "code":
            self._lines.append(line)
            fence = FENCE.match(self._lines[0])
            if fence and line.strip().startswith(fence[1]) and not line.strip().strip(fence[1][0]):
                yield self._end()
        elif FENCE.match(line) or line.lstrip().startswith("|"):
            self._kind = "code" if FENCE.match(line) else "table"
            self._lines.append(line)
        else:
            yield Part("line", line)

    def _end(self) -> Part:
        part = Part(self._kind, "\n".join(self._lines))
        self._lines, self._kind = [], "line"
        return part


def drawn(part: Part) -> RenderableType:
    """A part with its Markdown styled."""
    if part.kind == "table" and RULE.search(part.text) and "<" not in part.text:  # rich leaves HTML out
        from rich.markdown import Markdown

        return Markdown(part.text)
    if part.kind == "code":
        return _code(part.text)
    text = Text()
    if heading := re.match(r"#{1,6} +(?=\S)", part.text):
        return Text(part.text[heading.end() :], "bold underline")
    at = 0
    for mark in MARKS.finditer(part.text):
        text.append(part.text[at : mark.start()])
        text.append(mark["bold"] or mark["code"], "bold" if mark["bold"] else "cyan")
        at = mark.end()
    return text.append(part.text[at:])


def _code(text: str) -> Text:
    """A fenced block, coloured if its language is known; the fences stay, dimmed."""
    from rich.syntax import Syntax

    first, *lines = text.split("\n")
    fence = FENCE.match(first)
    last = [lines.pop()] if lines and fence and lines[-1].strip().startswith(fence[1]) else []
    code = Syntax("", (fence and fence[2]) or "text", background_color="default").highlight("\n".join(lines))
    code.rstrip()
    return Text("\n").join([Text(first, "dim"), *([code] if lines else []), *(Text(line, "dim") for line in last)])


# -- one answer ---------------------------------------------------------------------------------------------------


def show_answer(console: Console, pieces: Iterable[str]) -> None:
    """Print an answer as it comes, and an end of line behind it."""
    if not moves(console):
        for piece in pieces:
            console.file.write(piece)
            console.file.flush()
        console.file.write("\n")
        return
    parts, pace = Parts(), Pace()
    with _moving(console) as live:
        try:
            for piece in pieces:
                if (done := list(parts.feed(visible(piece)))) or pace.due():
                    _redraw(live, done, parts.rest)
        finally:
            _redraw(live, [parts.rest] if parts.rest.text else [], Part("line", ""))


def _redraw(live: Live, done: Iterable[Part], rest: Part) -> None:
    """Print what will not change any more above what will, in one go: else it would flicker."""
    with live.console:
        live.update(Text(""), refresh=True)
        for part in done:
            live.console.print(drawn(part))
        live.update(Tail(drawn(rest)), refresh=True)


def moves(console: Console) -> bool:
    """Whether what stands on it can change."""
    return console.is_terminal and not console.is_dumb_terminal


def _moving(console: Console) -> Live:
    return Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False)


class Pace:
    """Whether it is time to draw again: a fast model says more than a terminal can show without flickering."""

    def __init__(self) -> None:
        self._last = 0.0

    def due(self) -> bool:
        now = time.monotonic()
        if now - self._last < REDRAW_S:
            return False
        self._last = now
        return True


@dataclass(frozen=True)
class Tail:
    """The last lines of something that may be higher than the terminal: what moves must stay on the screen."""

    whole: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self.whole, options.update(height=None), pad=False)
        for line in lines[-max(1, console.height - 2) :]:
            yield from line
            yield Segment.line()


# -- several answers ----------------------------------------------------------------------------------------------


def show_side_by_side(console: Console, answers: Sequence[tuple[str, Iterable[str]]]) -> None:
    """Answers in columns, each under its title; one below the other where the terminal is narrow or is none."""
    titles = [title for title, _ in answers]
    if not moves(console) or console.width < NARROW:
        for title, pieces in answers:
            console.print(Text(f"── {title} ──", "bold"))
            show_answer(console, pieces)
        return
    said, pace = [""] * len(answers), Pace()
    with _moving(console) as live:
        try:
            for column, (_, pieces) in enumerate(answers):
                for piece in pieces:
                    said[column] += visible(piece)
                    live.update(Tail(_columns(titles, said)), refresh=pace.due())
        finally:
            live.update(Text(""), refresh=True)
            console.print(_columns(titles, said))


def _columns(titles: Sequence[str], said: Sequence[str]) -> Table:
    table = Table(box=None, expand=True, pad_edge=False, padding=(0, 2, 0, 0))
    for title in titles:
        table.add_column(Text(title, "bold underline"), ratio=1, overflow="fold")
    table.add_row(*(_whole(text) for text in said))
    return table


def _whole(text: str) -> RenderableType:
    parts = Parts()
    return Group(*map(drawn, [*parts.feed(text), parts.rest]))
