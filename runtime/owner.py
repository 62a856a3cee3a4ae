"""One thread owns every handle of llama.cpp. Others hand it calls; between two calls it does a step of its own work."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from edgelora.errors import EngineError

T = TypeVar("T")
Call = Callable[[], Any]


def closed() -> EngineError:
    """What a call to an engine that was closed gets, and every answer that it was in the middle of."""
    return EngineError(
        what="the engine is closed", why="close() frees the model and all it has computed", fix="open it"
    )


class Owner:
    """`work()` does one step and says whether more is to do; `end()` is the last thing that the thread does."""

    def __init__(self, work: Callable[[], bool], end: Callable[[], None]) -> None:
        self._work, self._end = work, end
        self._calls: SimpleQueue[tuple[Future[Any], Call] | None] = SimpleQueue()
        self._lock, self._closed = threading.RLock(), False  # a collected stream may cancel at any moment
        # a daemon, closed at exit: an engine that nobody closed must not keep the process
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def call(self, do: Callable[[], T]) -> T:
        """`do()` on the owner's thread, between two steps; what it returns or raises. EngineError once closed."""
        if threading.current_thread() is self._thread:
            return do()
        result: T = self._hand_over(do).result()
        return result

    def post(self, do: Call) -> None:
        """The same without waiting. Does nothing once closed."""
        try:
            self._hand_over(do)
        except EngineError:
            return

    def _hand_over(self, do: Call) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:  # nothing is put behind the last call
            if self._closed:
                raise closed()
            self._calls.put((future, do))
        return future

    def close(self) -> None:
        """Carry out the calls that were made before, then end. Safe to call twice and from several threads."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._calls.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self.close)

    def _run(self) -> None:
        busy = False
        while True:
            try:
                call = self._calls.get(block=not busy)
            except Empty:
                busy = self._work()
                continue
            if call is None:
                break
            _carry_out(*call)
            busy = True  # a call may have brought work
        self._end()


def _carry_out(future: Future[Any], do: Call) -> None:
    try:
        result = do()
    except BaseException as e:
        future.set_exception(e)
    else:
        future.set_result(result)
