"""Run a function in a child process of our own: true memory figures, and a crash in C costs an error, not the program.

The child sends its Progress while it works; what it returns or raises comes back as from a call.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from edgelora.errors import EdgeloraError, EngineError
from edgelora.progress import OnProgress, Progress, silent

T = TypeVar("T")


def run_in_child(work: Callable[..., T], *args: Any, on_progress: OnProgress = silent) -> T:
    """`work(*args, on_progress)` in a fresh process. `work` must be a module's function, its arguments picklable.

    Raises what `work` raised if that is an EdgeloraError; EngineError if the child died without a word.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, work, args), daemon=True)
    process.start()
    sender.close()
    try:
        while True:
            try:
                kind, value = receiver.recv()
            except EOFError:
                process.join()
                raise _died(work, process.exitcode) from None
            if kind == "progress":
                on_progress(value)
            elif kind == "error":
                raise value
            else:
                return value  # type: ignore[no-any-return]
    finally:
        receiver.close()
        process.join(timeout=5)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(sender: Connection, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    def tell(progress: Progress) -> None:
        sender.send(("progress", progress))

    try:
        sender.send(("result", work(*args, tell)))
    except EdgeloraError as e:
        sender.send(("error", e))
    except KeyboardInterrupt:
        pass  # the parent has it too, and reports it
    except BrokenPipeError:
        pass  # the parent is gone


def _died(work: Callable[..., Any], code: int | None) -> EngineError:
    name = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
    return EngineError(
        what=f"the child process of {work.__name__} ended without an answer ({name})",
        why="it ran out of memory, or llama.cpp aborted on a file; its last words are above",
        fix="free some memory and try again; if it happens again, check the model file with another one",
    )
