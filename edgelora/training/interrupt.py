"""Ctrl-C, a polite kill, a terminal that is closed: the first signal asks the run to stop where it can go on later, the
second stops it now, unless it is a closed terminal's.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType
from typing import NoReturn

from edgelora.config import TrainConfig
from edgelora.errors import EdgeloraError
from edgelora.invocation import command
from edgelora.training.folder import RunFolder

SIGNALS = tuple(one for one in signal.Signals if one.name in {"SIGINT", "SIGTERM", "SIGHUP"})  # not all have the last

STOPPING = "stopping behind this step; once more stops now"


class Stopped(EdgeloraError):
    """A run that was asked to stop: it stands at a checkpoint, if it had come to one."""

    def __init__(self, what: str, why: str, fix: str, exit_code: int = 130) -> None:
        super().__init__(what, why, fix)
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[type[EdgeloraError], tuple[str, str, str, int]]:  # type: ignore[override]
        return type(self), (self.what, self.why, self.fix, self.exit_code)


def how_to_go_on(config: TrainConfig) -> str:
    """`go on with: edgelora train base.gguf rows.jsonl --out adapters/mine --resume`."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return f"go on{', under torchrun as before,' * several} with: {resuming(config)}"


def resuming(config: TrainConfig, *more: str) -> str:
    """The command for it, with `more` options."""
    return command("train", config.base, *map(str, config.data), "--out", config.out, "--resume", *more)


def stopped(config: TrainConfig, step: int, total: int, interrupt: Interrupt) -> Stopped:
    """What a first signal left, behind a step of `total`, or `stop_when`: everything."""
    what = f"stopped behind step {step} of {total}; nothing is lost"
    why = "who listens to it wanted no more" if interrupt.asked is None else asked_by(interrupt.exit_code)
    return Stopped(what, why, how_to_go_on(config), interrupt.exit_code)


def at_once(config: TrainConfig, exit_code: int = 130) -> Stopped:
    """What a second signal left, or one before the first step: the last checkpoint, or nothing."""
    why, folder = asked_by(exit_code), RunFolder(config.out)
    step = folder.newest_step
    if step is not None and config.overwrite and not folder.is_of(config):
        return Stopped(
            "stopped at once, before the first step: what stands there is untouched", why,
            "give the same command again", exit_code,
        )  # fmt: skip
    if step is None:
        return Stopped(
            "stopped at once, before there was a checkpoint: nothing was saved", why, "give the same command again",
            exit_code,
        )  # fmt: skip
    return Stopped(
        f"stopped at once; what was learned until step {step} is saved, what came behind it is not", why,
        how_to_go_on(config), exit_code,
    )  # fmt: skip


def asked_by(exit_code: int) -> str:
    """What asked for a stop: `Ctrl-C`, or `the signal SIGTERM`."""
    return "Ctrl-C" if exit_code == 130 else f"the signal {signal.Signals(exit_code - 128).name}"


class Interrupt:
    """`asked`: the signal that asked for a stop, or None."""

    asked: signal.Signals | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if self.asked is None:
            self.asked = signal.Signals(number)
        elif signal.Signals(number).name != "SIGHUP":  # a closed terminal: its shell says it, and then the system too
            now(signal.Signals(number))

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP: as a shell has it."""
        return 128 + (self.asked or signal.SIGINT)


def now(asked: signal.Signals) -> NoReturn:
    """Stop here, as Python would by itself: KeyboardInterrupt for Ctrl-C, or SystemExit(143) for SIGTERM."""
    if asked is signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + asked)


def exit_code_of(stop: KeyboardInterrupt | SystemExit) -> int:
    """What a shell is told by what `now` raised."""
    return 130 if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0)


@contextmanager
def interruptible(on_asked: Callable[[], None] | None = None) -> Iterator[Interrupt]:
    """Listen to SIGNALS in this block. Only the main thread can: elsewhere nothing is changed.

    on_asked: called at the first one, at once and from another thread. SIGHUP is left as it is where it is ignored:
    `nohup` is there to outlive it.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    heard = [one for one in SIGNALS if one.name != "SIGHUP" or signal.getsignal(one) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        with nullcontext() if on_asked is None else _told_at_once(on_asked):
            yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _told_at_once(on_asked: Callable[[], None]) -> Iterator[None]:
    """Have a thread call it at the first signal in this block.

    Python runs a handler only when the product that it is in has ended, and perhaps in the midst of another line that
    is being written, whose lock the handler would wait for in vain.
    """
    there, here = os.pipe()
    os.set_blocking(here, False)  # as set_wakeup_fd wants it
    thread = threading.Thread(target=_listen, args=(there, on_asked), daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(here, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(here)  # the end of what the thread reads
        thread.join()
        os.close(there)


def _listen(there: int, on_asked: Callable[[], None]) -> None:
    while number := os.read(there, 1):
        if number[0] in SIGNALS:
            with suppress(OSError):  # a terminal that was closed
                on_asked()
            return
