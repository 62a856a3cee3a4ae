"""Draw Progress: a few live lines on a terminal, a plain line now and then elsewhere, JSON where a program listens.

Talk goes to stderr, in each of the three.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.text import Text

from edgelora.progress import Progress, Sample, as_json
from edgelora.words import count, visible

if TYPE_CHECKING:
    from edgelora.errors import EdgeloraError

PLAIN_LINE_EVERY_S = 15.0
BAR_CELLS = 24
WORDS_CELLS = 46  # of the line that the bar stands on: `train 1234/5678 · epoch 1.23 · 1:23:45 left`


def output() -> Console:
    """Standard output. A character that its encoding lacks is written as an escape."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return Console(highlight=False)


class Display:
    """For people, a context: `show` is an OnProgress, `say` prints a finished line, `choice` a setting that was chosen,
    `note` a warning.

    On a terminal the last moment stands in up to four live lines, which change in place; evaluations and answers
    are printed above them. Elsewhere a line is printed every PLAIN_LINE_EVERY_S and for each evaluation.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._live: Live | None = None
        self._told: set[str] = set()
        self._last = 0.0
        self._training: Progress | None = None
        self._held_out: float | None = None

    def __enter__(self) -> Display:
        # rich draws for programs too where FORCE_COLOR is set, and nothing at all on a dumb terminal
        if self.console.file.isatty() and not self.console.is_dumb_terminal:
            self._live = Live(Text(""), console=self.console, refresh_per_second=8, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def show(self, progress: Progress) -> None:
        if progress.loss is not None:
            if self._training is None or progress.step <= self._training.step:
                self._held_out = None  # another training
            self._training = progress
        if progress.held_out_loss is not None:
            self._held_out = progress.held_out_loss
            self._print(Text.assemble(evaluated(progress), (" (best)" if progress.best else "", "green")))
        for sample in progress.samples:
            self._print(answered(sample))
        if self._live:
            self._live.update(drawn(progress, self._training, self._held_out, self.console.width))
        elif progress.held_out_loss is None and (
            progress.stage not in self._told or time.monotonic() - self._last > PLAIN_LINE_EVERY_S
        ):  # an evaluation has its line already
            self._print(Text(describe(progress, self._held_out)))
        self._told.add(progress.stage)

    def say(self, line: str) -> None:
        self._print(Text.assemble(("✓ ", "green"), line))
        if self._live:
            self._live.update(Text(""))
        self._training = self._held_out = None  # what was said ends what was shown
        self._told.clear()

    def choice(self, name: str, value: str, why: str) -> None:
        self.say(f"{name}: {value} ({why})")

    def note(self, line: str) -> None:
        self._print(Text(f"note: {line}", "yellow"))

    def _print(self, line: Text) -> None:
        self._last = time.monotonic()
        self.console.print(line, soft_wrap=True)


class JsonLines:
    """For programs: what `Display` shows, as JSON on stderr, a line for each `event`; docs/events.md has them all."""

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pass

    def show(self, progress: Progress) -> None:
        self._print(as_json(progress))

    def say(self, line: str) -> None:
        self._print({"event": "said", "text": line})

    def choice(self, name: str, value: str, why: str) -> None:
        self._print({"event": "choice", "name": name, "value": value, "why": why})

    def note(self, line: str) -> None:
        self._print({"event": "note", "text": line})

    def error(self, error: EdgeloraError) -> None:
        self._print({"event": "error", "what": error.what, "why": error.why, "fix": error.fix})

    def _print(self, event: dict[str, object]) -> None:
        # one write: a signal is told of from another thread
        print(json.dumps(event, allow_nan=False) + "\n", end="", file=sys.stderr, flush=True)


Listener = Display | JsonLines


def listener(as_json: bool) -> Listener:
    """Who draws what a command does: for programs, or for people."""
    return JsonLines() if as_json else Display()


# -- a moment in words --------------------------------------------------------------------------------------------


def drawn(p: Progress, training: Progress | None, held_out: float | None = None, width: int = 80) -> Text:
    """The live lines, for a terminal as wide. While a training evaluates, its own last numbers stay where they are."""
    bar = max(0, min(BAR_CELLS, width - WORDS_CELLS))
    done = int(bar * min(p.step / max(p.total, 1), 1))
    lines = [describe(p)]
    if training:
        lines = [place(p), learning(training, held_out), preferring(training.numbers), machine(training)]
    # cut, never wrapped: a line more or less would make all of them jump
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append("━" * done, "green").append("━" * (bar - done), "dim").append("  " * (bar > 0))
    return text.append("\n".join(line for line in lines if line))


def describe(p: Progress, held_out: float | None = None) -> str:
    """`train 12/116 · epoch 0.21 · 2:41 left · loss 0.146 · 285 tokens/s · peak 1122 MB`."""
    return _joined((place(p), learning(p, held_out), preferring(p.numbers), machine(p)))


def place(p: Progress) -> str:
    """How far it is."""
    return _joined((
        f"{p.stage} {p.step}/{p.total}",
        "" if p.epoch is None else f"epoch {p.epoch:.2f}",
        "" if p.eta_s is None else f"{duration(p.eta_s)} left",
    ))  # fmt: skip


def learning(p: Progress, held_out: float | None = None) -> str:
    """What it learns: `loss 0.146 · smoothed 0.162 · held-out 0.171 · lr 1.9e-04 · grad 0.71`."""
    return _joined((
        "" if p.loss is None else f"loss {p.loss:.3f}",
        "" if p.smoothed_loss is None else f"smoothed {p.smoothed_loss:.3f}",
        "" if held_out is None else f"held-out {held_out:.3f}",
        "" if p.learning_rate is None else f"lr {p.learning_rate:.1e}",
        "" if p.grad_norm is None else f"grad {p.grad_norm:.3g}",
    ))  # fmt: skip


def preferring(numbers: Mapping[str, float]) -> str:
    """The rewards of a preference objective: `chosen +0.213 · rejected -0.101 · margin +0.314 · accuracy 75%`."""
    chosen, rejected, margin, accuracy = (
        numbers.get(f"rewards/{name}") for name in ("chosen", "rejected", "margins", "accuracies")
    )
    return _joined((
        "" if chosen is None else f"chosen {chosen:+.3f}",
        "" if rejected is None else f"rejected {rejected:+.3f}",
        "" if margin is None else f"margin {margin:+.3f}",
        "" if accuracy is None else f"accuracy {accuracy:.0%}",
    ))  # fmt: skip


def machine(p: Progress) -> str:
    """What it takes."""
    return _joined((
        f"{p.tokens_per_s:.0f} tokens/s" if p.tokens_per_s else "",
        f"peak {p.peak_bytes / 1e6:.0f} MB" if p.peak_bytes else "",
        f"{count(p.skipped_steps, 'step')} skipped" if p.skipped_steps else "",
    ))  # fmt: skip


def evaluated(p: Progress) -> str:
    """`train 60/300 · epoch 0.40 · smoothed 0.351 · held-out 0.2014`."""
    return _joined((
        f"{p.stage} {p.step}/{p.total}",
        "" if p.epoch is None else f"epoch {p.epoch:.2f}",
        "" if p.smoothed_loss is None else f"smoothed {p.smoothed_loss:.4f}",
        f"held-out {p.held_out_loss:.4f}",
        preferring(p.held_out_numbers),
    ))  # fmt: skip


def answered(sample: Sample) -> Text:
    """`  Lock the door → {"lock": "door"}`, on one line and with nothing in it that a terminal would obey."""
    end = "" if sample.ended else "…"
    return Text.assemble((f"  {visible(sample.prompt)} → ", "dim"), visible(sample.text), (end, "dim"))


def duration(seconds: float) -> str:
    """`2:41`, `1:02:41`, `3 d 1:02`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24}:{m:02d}"
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def _joined(parts: Iterable[str]) -> str:
    return " · ".join(part for part in parts if part)
