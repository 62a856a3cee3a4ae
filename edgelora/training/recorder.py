"""What a run writes down while it goes on: metrics, checkpoints and the curve; and who hears of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from edgelora.config import TrainConfig
from edgelora.device import peak_memory_bytes
from edgelora.progress import Progress
from edgelora.training.checkpoint import write_checkpoint
from edgelora.training.curve import draw_curve
from edgelora.training.folder import RunFolder
from edgelora.training.interrupt import Interrupt
from edgelora.training.metrics import Metrics, MetricsLog, metrics_of, read_metrics
from edgelora.training.ready import Listeners
from edgelora.training.state import State
from edgelora.training.tensorboard import TensorBoardLog

DRAW_EVERY_S = 60.0
PACED = 3  # steps of this process behind which it says how long the rest takes
WORTH_SAYING_S = 60.0


@dataclass(frozen=True)
class About:
    """A run: `facts` stand in each of its checkpoints, `title` over its curve. It goes on behind step `after`."""

    config: TrainConfig
    facts: Mapping[str, Any]
    title: str
    after: int | None = None  # a new run


class Recorder:
    """A `loop.Watch` that writes into a run folder. A context; made, it has written nothing yet."""

    def __init__(self, folder: RunFolder, about: About, heard: Listeners, interrupt: Interrupt) -> None:
        self._folder, self._about, self._heard, self._interrupt = folder, about, heard, interrupt
        self._board = TensorBoardLog(folder.tensorboard, about.after) if about.config.tensorboard else None
        self._steps, self._enough, self._drawn = 0, False, time.perf_counter()
        self._lost: OSError | None = None

    def __enter__(self) -> Recorder:
        with ExitStack() as stack:
            self._log = stack.enter_context(MetricsLog(self._folder.metrics, self._about.after))
            if self._board is not None:
                stack.enter_context(self._board)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, tb)

    def stepped(self, progress: Progress, tokens: int, seconds: float) -> None:
        metrics = metrics_of(progress, tokens, seconds)
        self._log.append(metrics)
        if self._board is not None:
            self._board.append(metrics)
        self._steps += progress.loss is not None
        try:
            self._tell(progress)
        except OSError as e:  # nobody hears any more: what was learned until this step must not be lost with it
            self._lost = e
        self._enough = self._heard.stop_when is not None and self._heard.stop_when(progress)

    def _tell(self, progress: Progress) -> None:
        self._heard.on_progress(progress)
        left_s = progress.eta_s or 0.0
        if self._steps == PACED and left_s >= WORTH_SAYING_S:
            self._heard.on_note(f"about {left_s / 60:.0f} min to go, at the pace of the first {PACED} steps")

    def save(self, state: State) -> None:
        self._log.sync()
        best = None if state.best is None else state.best.step
        snapshot = state.snapshot(dict(self._about.facts))
        # those of steps that taught nothing push out none of what stood before
        keep_last = self._about.config.keep_checkpoints + state.in_a_row
        write_checkpoint(self._folder.checkpoints, snapshot, keep_last=keep_last, best=best)
        if time.perf_counter() - self._drawn > DRAW_EVERY_S:
            self.draw()

    def asked_to_stop(self) -> bool:
        return self._enough or self._lost is not None or self._interrupt.asked is not None

    def raise_lost(self) -> None:
        """Raise what ended the run where nobody asked it to stop: what should have heard of it, such as a pipe."""
        if self._lost is not None and self._interrupt.asked is None:
            raise self._lost

    def peak_bytes(self) -> int | None:
        return peak_memory_bytes(self._about.config.device)

    def draw(self) -> None:
        """`curve.png` as the run stands now."""
        draw_curve(self._folder.curve, self.metrics(), self._about.title, self._about.config.objective)
        self._drawn = time.perf_counter()

    def metrics(self) -> list[Metrics]:
        return read_metrics(self._folder.metrics)


class Silent:
    """A `loop.Watch` of a process that only computes: another one writes. A context, like `Recorder`."""

    def __init__(self, interrupt: Interrupt) -> None:
        self._interrupt = interrupt

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pass

    def stepped(self, progress: Progress, tokens: int, seconds: float) -> None:
        pass

    def save(self, state: State) -> None:
        pass

    def asked_to_stop(self) -> bool:
        return self._interrupt.asked is not None

    def peak_bytes(self) -> int | None:
        return None

    def raise_lost(self) -> None:
        pass

    def draw(self) -> None:
        pass
