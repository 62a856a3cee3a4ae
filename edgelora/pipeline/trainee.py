"""A trial of a sweep as it is trained: in a child process, as far as it is sent, and stopped when somebody asks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from edgelora.child import run_in_child
from edgelora.config import TrainConfig
from edgelora.errors import ConfigError
from edgelora.files.checkpoint import read_json
from edgelora.progress import OnProgress, Progress, finite
from edgelora.training.folder import RunFolder
from edgelora.training.interrupt import STOPPING, Stopped
from edgelora.training.metrics import read_metrics
from edgelora.training.sweep import Result, Trial


@dataclass(frozen=True)
class Leg:
    """What a child brings back. digests: of the base and the rows. notes: what was odd about them."""

    result: Result
    digests: dict[str, str]
    notes: list[str]


@dataclass
class Trainee:
    """The child that trains. It is asked to stop at the first signal, and once: a second one would cost it the step."""

    on_progress: OnProgress
    on_note: Callable[[str], None]
    _pid: int | None = None
    """Once it has begun: before its first step there is nothing that it could save."""
    _asked: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def train(self, config: TrainConfig, share: float, is_asked: Callable[[], bool]) -> Leg:
        """Train until the first held-out loss at or behind `share` of the run, from where it stands.

        is_asked: whether somebody has asked for a stop. Raises what `run_training` does.
        """
        others = multiprocessing.active_children()

        def hear(progress: Progress) -> None:
            if self._pid is None:
                self._pid = next((c.pid for c in multiprocessing.active_children() if c not in others), None)
            if is_asked():  # before it had begun
                self._ask()
            self.on_progress(progress)

        try:
            return run_in_child(train_to, config, share, with_torch=True, on_progress=hear)
        finally:
            self._pid = None

    def answer(self) -> None:
        """The first signal, in a thread of its own: a step may be long."""
        self._ask()
        self.on_note(STOPPING)

    def _ask(self) -> None:
        with self._lock, suppress(ProcessLookupError):
            if self._pid is not None and not self._asked:
                self._asked = True
                os.kill(self._pid, signal.SIGINT)  # whichever its parent got: who asked is told there


def require_trainable(trials: Sequence[Trial], _on_progress: OnProgress) -> None:
    """Raise ConfigError, before anything is trained, that tells what is wrong with any trial's settings: a rank where
    the method has none, layers that the base has not. Runs in a child, for the table of methods needs torch."""
    from edgelora.base.model import open_base
    from edgelora.training.objectives import objective_of
    from edgelora.training.settle import settle
    from edgelora.training.where import require_place

    base = open_base(trials[0].config.base)  # one for all
    faults: list[tuple[str, ConfigError]] = []
    for trial in trials:
        try:
            objective_of(trial.config)
            require_place(settle(trial.config, base).config, base)
        except ConfigError as e:
            faults.append((trial.name, e))
    if faults:
        (name, first), n = faults[0], len(faults)
        raise ConfigError(
            what=f"{n} of {len(trials)} trials cannot be trained, such as {name}: {first.what}",
            why="; ".join(dict.fromkeys(e.why for _, e in faults)),
            fix=first.fix,
        )


def train_to(config: TrainConfig, share: float, on_progress: OnProgress) -> Leg:
    """Train until the first held-out loss at or behind `share` of the run, from where it stands. Runs in a child."""
    os.setpgid(0, 0)  # Ctrl-C reaches a whole group: the parent alone shall hear it, and hands it on once
    from edgelora.training.loop import NotFinite
    from edgelora.training.run import run_training

    total, at_rung, ended = 0, False, False
    fault, loss = None, None
    notes: list[str] = []

    def hear(progress: Progress) -> None:
        nonlocal total
        if progress.stage == "train":  # and not how far reading is
            total = progress.total
            on_progress(replace(progress, stage=config.out.name))

    def is_there(progress: Progress) -> bool:
        nonlocal at_rung
        at_rung = progress.held_out_loss is not None and progress.step >= share * progress.total
        return at_rung

    try:
        run = run_training(config, hear, on_note=notes.append, stop_when=is_there)
        ended, loss = True, run.held_out_loss
    except Stopped:
        if not at_rung:
            raise
    except NotFinite as e:
        fault = e.what
    folder = RunFolder(config.out)
    metrics = read_metrics(folder.metrics)
    result = Result(
        step=metrics[-1].step, total=total or metrics[-1].step, seconds=metrics[-1].seconds or 0.0,
        held_out=tuple((m.step, finite(m.held_out_loss)) for m in metrics if m.held_out_loss is not None and m.step),
        ended=ended, adapter_loss=finite(loss), fault=fault,
    )  # fmt: skip
    return Leg(result, read_json(folder.facts)["digests"], notes)
