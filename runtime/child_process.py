"""One child process with a pipe: started, spoken to without ever blocking or tearing a message, buried."""

from __future__ import annotations

import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from multiprocessing.connection import Connection

from edgelora.errors import EngineError, WorkerDied
from runtime.worker_messages import FromChild, ToChild

LAST_WORDS_BYTES = 2000
DYING_SECONDS = 5.0

# `-c` and not multiprocessing: a program that uses us need not guard its main module, nor is a second helper started
CHILD = """
import sys
sys.path[:] = {path!r}
from runtime.worker_child import main
main({descriptor})
"""


class Child:
    """A process that runs `worker_child.main`. Start it in a thread that lives as long as it shall live (Linux ends
    it with that thread); `receive` and `bury` belong to that thread, the rest may be called from any."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 (`bury` closes it)
        code = CHILD.format(path=sys.path, descriptor=theirs.fileno())
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                stdin=subprocess.DEVNULL, stdout=self._words, stderr=self._words, pass_fds=[theirs.fileno()],
                process_group=0,  # a terminal's Ctrl-C is for the parent
                env={**os.environ, "GGML_NO_BACKTRACE": "1"},  # else an abort starts a debugger
            )  # fmt: skip
        self._pipe = Connection(ours.detach())
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        # Ctrl-C interrupts the main thread anywhere; a message sent there could end in its middle
        self._sender = threading.Thread(target=self._send, name="edgelora-worker-sender", daemon=True)
        self._sender.start()
        self._why: str | None = None
        self._death: WorkerDied | None = None

    def post(self, message: ToChild) -> None:
        """Send it, now or as soon as the child reads. Raises EngineError for what cannot be sent at all."""
        try:
            raw = pickle.dumps(message)
        except (RecursionError, TypeError, AttributeError, pickle.PicklingError) as e:
            raise EngineError(
                what="a request that cannot be sent to the worker",
                why=f"{type(e).__name__}: {e}",
                fix="build it of plain texts, numbers, lists and dicts, not nested hundreds deep",
            ) from None
        self._outbox.put(raw)

    def _send(self) -> None:
        while (raw := self._outbox.get()) is not None:
            try:
                self._pipe.send_bytes(raw)
            except OSError:  # it is dead: whoever receives notices
                return

    def receive(self, wait_seconds: float) -> FromChild | None:
        """The next message, None if none came in time. Raises EOFError once the child is dead."""
        try:
            if not self._pipe.poll(wait_seconds):
                return None
            message: FromChild = pickle.loads(self._pipe.recv_bytes())
        except OSError as e:
            raise EOFError from e
        except (pickle.UnpicklingError, ValueError, MemoryError, ImportError, AttributeError) as e:
            self.kill("it sent what is no message")  # its memory is not to be trusted any more
            raise EOFError from e
        return message

    def kill(self, why: str) -> None:
        """End it; `why` is what its death is explained with."""
        self._why = why
        self._process.kill()

    def bury(self) -> WorkerDied:
        """Wait for its end (it has shut its pipe, or was killed), free all it had, and say how it ended."""
        if self._death is not None:
            return self._death
        self._outbox.put(None)
        try:
            self._process.wait(DYING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._sender.join()
        self._pipe.close()
        with self._words as words:
            words.seek(max(0, words.seek(0, os.SEEK_END) - LAST_WORDS_BYTES))
            lines = [line.strip() for line in words.read().decode("utf-8", "replace").splitlines() if line.strip()]
        self._death = _death(self._process.returncode, self._why or (lines[-1] if lines else None))
        return self._death


def _death(code: int, words: str | None) -> WorkerDied:
    if words is None and -code == signal.SIGKILL:
        words = "something outside ended it, most likely because memory ran out"
    how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    return WorkerDied(
        what=f"the process that holds the model ended ({how})",
        why=words or "it left no last words: so llama.cpp ends on a file or a text that it cannot take",
        fix="ask once more: it is being started again, and what ends it twice is refused from then on",
    )
