"""Draw Progress: a live line on a terminal, a plain line now and then elsewhere. Talk goes to stderr."""

from __future__ import annotations

import io
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from edgelora.progress import Progress

PLAIN_LINE_EVERY_S = 15.0


def output() -> Console:
    """Standard output. A character that its encoding lacks is written as an escape."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return Console(highlight=False)


def describe(p: Progress) -> str:
    """`train 12/116 · loss 0.146 · 285 tokens/s · 2:41 left · 1122 MB`."""
    parts = [f"{p.stage} {p.step}/{p.total}"]
    if p.loss is not None:
        parts.append(f"loss {p.loss:.3f}")
    if p.tokens_per_s:
        parts.append(f"{p.tokens_per_s:.0f} tokens/s")
    if p.eta_s is not None:
        minutes, seconds = divmod(round(p.eta_s), 60)
        parts.append(f"{minutes}:{seconds:02d} left")
    if p.peak_bytes:
        parts.append(f"peak {p.peak_bytes / 1e6:.0f} MB")
    return " · ".join(parts)


class Display:
    """A context in which `show` is an OnProgress and `say` prints a finished line."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._live: Live | None = None
        self._stage, self._last = "", 0.0

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._live = Live(Text(""), console=self.console, refresh_per_second=8, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def show(self, progress: Progress) -> None:
        line = describe(progress)
        if self._live:
            done = int(24 * progress.step / max(progress.total, 1))
            self._live.update(Text.assemble(("━" * done, "green"), ("━" * (24 - done), "dim"), "  ", line))
        elif progress.stage != self._stage or time.monotonic() - self._last > PLAIN_LINE_EVERY_S:
            self._stage, self._last = progress.stage, time.monotonic()
            self.console.print(line, soft_wrap=True)

    def say(self, line: str) -> None:
        self.console.print(Text.assemble(("✓ ", "green"), line), soft_wrap=True)
        if self._live:
            self._live.update(Text(""))
        self._stage = ""
