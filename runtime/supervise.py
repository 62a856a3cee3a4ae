"""A child that is started again when it dies: one thread that starts it, hears it, and tells everybody of its death."""

from __future__ import annotations

import copy
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgelora.errors import EdgeloraError, EngineError, WorkerDied
from runtime.child_process import Child
from runtime.worker_messages import Ask, Call, Fault, FromChild, Open, Opened, Result, ToChild
from runtime.worker_record import Record
from runtime.worker_stream import Pending

LONGEST_PAUSE_SECONDS = 10.0


@dataclass(frozen=True)
class Patience:
    """How long a worker bears with its child."""

    open_seconds: float = 600.0
    """For the engine to stand, and for each adapter that is loaded again."""
    silent_seconds: float = 600.0
    """Without a word while something is owed: then it hangs, and is killed. A long prompt is silent, too."""
    close_seconds: float = 5.0
    restarts: int = 5
    """In a row, with nothing answered in between; then the worker gives up."""
    pause_seconds: float = 0.1
    """Before the first of them; twice as long before each further one."""


class Supervisor:
    """What was asked of a child, whichever child it is just now. Safe to use from several threads."""

    def __init__(self, first: Callable[[int], Open], record: Record, patience: Patience) -> None:
        self._first, self._record, self._patience = first, record, patience
        self._changed = threading.Condition()  # guards what follows
        self._child: Child | None = None
        self._opened: Opened | None = None  # by the child of now
        self._end: EdgeloraError | None = None  # why nothing can be asked any more
        self._pending: dict[int, Pending] = {}
        self._deaths = 0  # since the last answer
        self._numbers = itertools.count()
        # a thread of its own, for on Linux a child ends with the thread that started it
        self._thread = threading.Thread(target=self._run, name="edgelora-worker", daemon=True)
        self._thread.start()

    def ready(self) -> Opened:
        """Wait until a child stands. Raises the error for which none does."""
        with self._changed:
            self._changed.wait_for(lambda: self._opened or self._end)
            if self._end is not None:
                raise copy.copy(self._end)  # one instance would gather the traceback of each
            assert self._opened is not None
            return self._opened

    def ask(self, message: Callable[[int], Call | Ask]) -> Pending:
        """Send it to the child, after a restart if there is one going on."""
        with self._changed:
            self.ready()
            assert self._child is not None
            pending = Pending(message(next(self._numbers)))
            self._pending[pending.asked.number] = pending
            try:
                self._child.post(pending.asked)
            except BaseException:
                del self._pending[pending.asked.number]
                raise
            return pending

    def tell(self, message: ToChild) -> None:
        """Send what needs no answer. It takes no lock: it is called from destructors, at any moment."""
        if (child := self._child) is not None:
            child.post(message)

    def close(self) -> None:
        """End the child; whatever is still asked gets an EngineError. A second call does nothing."""
        with self._changed:
            child, polite = self._child, self._end is None and self._opened is not None
            if polite and child is not None:
                child.post(Call(next(self._numbers), "close", {}))
            self._finish(
                EngineError(what="a closed worker was used", why="close() ends its process", fix="open it again")
            )
        if polite:
            self._thread.join(self._patience.close_seconds)
        if child is not None:
            child.kill("it was closed")
        self._thread.join()

    def _finish(self, error: EdgeloraError) -> None:
        """From now on nothing can be asked. The lock is held."""
        self._end = self._end or error
        self._tell_all(self._end)
        self._changed.notify_all()

    def _tell_all(self, error: EdgeloraError) -> None:
        """Nothing that is asked will be answered. The lock is held."""
        for pending in self._pending.values():
            pending.bring(Fault(pending.asked.number, error))
        self._pending.clear()

    # -- the supervisor's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (child := self._start()) is not None:
            self._hear(child)
            self._mourn(child.bury())

    def _start(self) -> Child | None:
        """A child that has all it needs; None if the worker is closed or gave up."""
        while True:
            with self._changed:
                if self._deaths:
                    pause = self._patience.pause_seconds * 2 ** (self._deaths - 1)
                    self._changed.wait_for(lambda: self._end, min(pause, LONGEST_PAUSE_SECONDS))
                if self._end is not None:
                    return None
                first = not self._deaths
            try:
                return self._started()
            except EdgeloraError as e:
                self._count_death(e, final=first)
            except OSError as e:
                self._count_death(
                    EngineError(
                        what="the process that holds the model cannot be started", why=str(e),
                        fix="end other programs, or raise the limits on processes and open files",
                    ),
                    final=first,
                )  # fmt: skip

    def _started(self) -> Child:
        """One try. Raises WorkerDied, what the engine raised, or OSError where there can be no process."""
        with self._changed:
            if self._end is not None:
                raise self._end
            self._child = child = Child()
        try:
            opened: Opened = self._answer(child, self._first(next(self._numbers)))
            self._record.load_again(lambda call: self._answer(child, call(next(self._numbers))))
        except BaseException:
            child.kill("it could not be started")
            child.bury()
            raise
        with self._changed:
            self._opened = opened
            self._changed.notify_all()
        return child

    def _answer(self, child: Child, message: Open | Call) -> Any:
        """Ask a child that serves nobody yet."""
        child.post(message)
        deadline = time.monotonic() + self._patience.open_seconds
        while True:
            try:
                answer = child.receive(max(0.0, deadline - time.monotonic()))
            except EOFError:
                raise child.bury() from None
            if answer is None:
                child.kill(f"it was not ready after {self._patience.open_seconds:g} s")
                raise child.bury()
            if isinstance(answer, Fault):
                raise answer.error
            if isinstance(answer, Result):
                return answer.value

    def _hear(self, child: Child) -> None:
        """Hand on what it says, until its end."""
        limit = self._patience.silent_seconds
        heard = time.monotonic()
        while True:
            try:
                message = child.receive(min(1.0, limit / 4))
            except EOFError:
                return
            if message is not None:
                self._hand_on(message)
            if message is not None or not self._owed():
                heard = time.monotonic()
            elif time.monotonic() - heard > limit:
                child.kill(f"it said nothing for {limit:g} s")

    def _hand_on(self, message: FromChild) -> None:
        with self._changed:
            pending = self._pending.get(message.number)
            if pending is None:
                return
            if isinstance(message, Result | Fault):
                self._deaths = 0
                del self._pending[message.number]
                self._record.answered(pending.asked, message)
            pending.bring(message)

    def _owed(self) -> bool:
        """Whether the child has something to say. It may be silent while a reader has not taken what there is."""
        with self._changed:
            return bool(self._pending) and not any(pending.unread for pending in self._pending.values())

    def _mourn(self, death: WorkerDied) -> None:
        with self._changed:
            self._child = self._opened = None
            self._record.died([pending.asked for pending in self._pending.values()])
            self._tell_all(death)
        self._count_death(death)

    def _count_death(self, error: EdgeloraError, *, final: bool = False) -> None:
        with self._changed:
            self._deaths += 1
            if final:
                self._finish(error)
            elif self._deaths > self._patience.restarts:
                self._finish(
                    WorkerDied(
                        what=f"the process that holds the model ended {self._deaths} times without an answer",
                        why=f"the last time: {error.what}: {error.why}",
                        fix="see to this, then open the worker again",
                    )
                )
