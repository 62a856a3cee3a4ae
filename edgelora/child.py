"""Run a function in a child process of our own: true memory figures, and a crash in C costs an error, not the program.

The child sends its Progress while it works, and what Python warns of there is shown here; what it returns or raises
comes back as from a call.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

from edgelora.errors import EdgeloraError, EngineError
from edgelora.progress import OnProgress, Progress, silent

T = TypeVar("T")

PRELOADED = ["torch", "edgelora.base.decoder"]  # 1.1 s of CPU time; starts no thread, which a fork would lose
FORK_EVERY_CHILD = False  # for tests: 0.1 s instead of 0.4, but then each has torch's 200 MB in its memory
PRIVATE_SOCKET = (3, 11, 1)  # before it, any local user could talk to the process that forks (CVE-2022-42919)


def run_in_child(work: Callable[..., T], *args: Any, with_torch: bool = False, on_progress: OnProgress = silent) -> T:
    """`work(*args, on_progress)` in a fresh process. `work` must be a module's function, its arguments picklable.

    with_torch: it needs torch; where that can be, it is forked from a process that has imported it (`expect_torch`).
    Raises what `work` raised if that is an EdgeloraError; EngineError if the child died without a word.
    """
    forked = (with_torch or FORK_EVERY_CHILD) and expect_torch()
    context: BaseContext = multiprocessing.get_context("forkserver" if forked else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, dict(os.environ), work, args), daemon=True)  # type: ignore[attr-defined]
    try:
        process.start()
    except (OSError, EOFError):  # what should fork it is gone
        raise _died(work, None) from None
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
            elif kind == "warning":
                warnings.showwarning(*value)
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


def expect_torch() -> bool:
    """Start the process that imports torch once and forks every child that needs it; False where that cannot be.

    It ends with this process. Early is good: it imports while the caller works.
    """
    if sys.platform != "linux" or sys.version_info < PRIVATE_SOCKET:  # Apple's frameworks do not outlive a fork
        return False
    if multiprocessing.parent_process() is not None:  # a child would start a server of its own, for one child
        return False
    from multiprocessing import forkserver, resource_tracker

    forkserver.set_forkserver_preload(PRELOADED)
    resource_tracker.ensure_running()  # it would let Ctrl-C in again
    try:
        with _alone():
            forkserver.ensure_running()
    except OSError:  # TMPDIR is too long for the name of a socket
        return False
    return True


@contextmanager
def _alone() -> Iterator[None]:
    """What starts in here never imports from the folder one happens to stand in, and Ctrl-C does not reach it."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        del os.environ["PYTHONSAFEPATH"]
        if before is not None:
            os.environ["PYTHONSAFEPATH"] = before
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _serve(sender: Connection, environment: Mapping[str, str], work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.clear()  # if it was forked, it has what its parent's was when the first one was
    os.environ.update(environment)

    def tell(progress: Progress) -> None:
        sender.send(("progress", progress))

    def warn(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        # the parent has not imported what defines a category of its own
        known = next(one for one in category.__mro__ if one.__module__ == "builtins")
        sender.send(("warning", (str(message), known, filename, lineno)))

    warnings.showwarning = warn  # type: ignore[assignment]
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        sender.send(("result", work(*args, tell)))
    except EdgeloraError as e:
        sender.send(("error", e))
    except KeyboardInterrupt:
        pass  # the parent has it too, and reports it
    except BrokenPipeError:
        pass  # the parent is gone


def _died(work: Callable[..., Any], code: int | None) -> EngineError:
    name = "it never began" if code is None else signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return EngineError(
        what=f"the child process of {work.__name__} ended without an answer ({name})",
        why="it ran out of memory, or llama.cpp aborted on a file; its last words are above",
        fix="free some memory and try again; if it happens again, check the model file with another one",
    )
