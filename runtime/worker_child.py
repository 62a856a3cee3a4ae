"""The worker's child: an engine that does what comes over a pipe, and ends with its parent.

One thread reads, so that a parent's end is noticed at once; each thing asked has a thread of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import resource
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from edgelora.errors import EdgeloraError, EngineError
from runtime.service import Service, Stream
from runtime.worker_messages import (
    Accepted,
    Ask,
    Call,
    Cancel,
    Fault,
    FromChild,
    More,
    Open,
    Opened,
    Result,
    Said,
    ToChild,
)

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(descriptor: int) -> None:
    """Serve the pipe whose end is this open file, until the other end closes."""
    os.set_inheritable(descriptor, False)  # a grandchild that held it would hide our death from the parent
    _prepare_to_die()
    Desk(Connection(descriptor)).serve()


def _prepare_to_die() -> None:
    """Before anything else in this process, if it comes to that; leave no core of the size of a model behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it cancels what it asked for
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        # beside the pipe's end: that is not seen while C code holds the interpreter
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("500")  # of the two, the one that is started again


class Desk:
    """The child's end of the pipe, and the service behind it."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._sending = threading.Lock()
        self._service: Service | None = None
        self._flows: dict[int, _Flow] = {}

    def serve(self) -> None:
        """Read until the parent is gone, then leave at once: nothing is left to be answered or kept."""
        while True:
            try:
                message: ToChild = pickle.loads(self._pipe.recv_bytes())
            except (EOFError, OSError):
                os._exit(0)
            match message:
                case More():
                    if flow := self._flows.get(message.number):
                        flow.more(message.pieces)
                case Cancel():
                    if flow := self._flows.get(message.number):
                        _in_thread(flow.cancel)
                case Ask():
                    self._flows[message.number] = flow = _Flow(message.window)
                    _in_thread(self._reply, message.number, self._answer, message, flow)
                case Open() | Call():
                    _in_thread(self._reply, message.number, self._do, message)

    def _reply(self, number: int, work: Callable[..., object], *arguments: object) -> None:
        """Do it; what it returns or raises goes to the parent."""
        try:
            self._say(Result(number, work(*arguments)))
        except EdgeloraError as e:
            self._say(Fault(number, e))
        except OSError as e:
            self._say(Fault(number, _unexpected(e, "check the file or the disk that it names")))
        except Exception as e:
            self._say(Fault(number, _unexpected(e, "this is a fault of edgelora: please report it")))
        finally:
            self._flows.pop(number, None)

    def _do(self, message: Open | Call) -> object:
        if isinstance(message, Open):
            self._service = message.factory(message.base, message.config)
            return Opened(self._service.name, self._service.threads)
        result = getattr(self._service, message.method)(**message.arguments)
        if message.method == "close":
            os._exit(0)
        return result

    def _answer(self, message: Ask, flow: _Flow) -> object:
        assert self._service is not None  # Open is the first message, and its answer is waited for
        stream = self._service.generate(message.request)
        self._say(Accepted(message.number))
        flow.of(stream)
        for piece in stream:  # to its end, cancelled or not: only then its usage is known
            if flow.wait():
                self._say(Said(message.number, piece))
        return stream.usage

    def _say(self, message: FromChild) -> None:
        raw = pickle.dumps(message)
        with self._sending, contextlib.suppress(OSError):  # the parent is gone: the reader notices, and ends us
            self._pipe.send_bytes(raw)


class _Flow:
    """How many pieces of one stream may be sent: the reader's slowness stops the stream, not its memory."""

    def __init__(self, window: int) -> None:
        self._left, self._cancelled = window, False
        self._changed = threading.Condition()
        self._stream: Stream | None = None

    def of(self, stream: Stream) -> None:
        with self._changed:
            self._stream = stream
            cancelled = self._cancelled
        if cancelled:
            stream.cancel()

    def wait(self) -> bool:
        """Wait until one more piece may go; False if nobody wants it any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._left or self._cancelled)
            self._left -= 1
            return not self._cancelled

    def more(self, pieces: int) -> None:
        with self._changed:
            self._left += pieces
            self._changed.notify()

    def cancel(self) -> None:
        with self._changed:
            self._cancelled = True
            self._changed.notify()
            stream = self._stream
        if stream is not None:
            stream.cancel()


def _in_thread(work: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=work, args=arguments, daemon=True).start()


def _unexpected(error: Exception, fix: str) -> EngineError:
    return EngineError(
        what=f"the engine failed: {type(error).__name__}", why=str(error) or "it gave no reason", fix=fix
    )
