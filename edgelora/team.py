"""Run C calls that release the GIL on all cores: on torch's own OpenMP threads where it is loaded, else on a pool.

After each product torch's threads keep spinning for a moment, waiting for the next. A second pool beside them fights
for the cores and loses: two threads were slower than one. Asked through libgomp itself, the same threads do the work:
1.4 to 1.8 times faster than one from a matrix of 1M weights on (Q4_0, Q4_1, Q6_K; two cores).
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

Piece = tuple[int, int]
Work = Callable[[int, int], None]

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def cores() -> int:
    """How many this process may run on; at least 1."""
    return max(1, len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)


def threads() -> int:
    """As many as torch computes with, where it is loaded: another number would make libgomp build its team anew."""
    torch = sys.modules.get("torch")
    return cores() if torch is None else min(cores(), int(torch.get_num_threads()))


def split(n_rows: int, elements: int, worth_a_thread: int) -> list[Piece]:
    """Cut [0, n_rows) into at most one piece per thread, none of fewer elements than are worth one."""
    pieces = min(elements // worth_a_thread, n_rows)
    if pieces < 2 or (pieces := min(pieces, threads())) < 2:
        return [(0, n_rows)]
    return list(itertools.pairwise([n_rows * i // pieces for i in range(pieces + 1)]))


def run(pieces: Sequence[Piece], work: Work) -> None:
    """Call `work(first, last)` for each piece, side by side, and wait for all."""
    if len(pieces) == 1:
        work(*pieces[0])
    elif (openmp := shared_openmp()) is not None:
        _run_in(openmp, pieces, work)
    else:
        _run_on(_pool(), pieces, work)


def shared_openmp() -> ctypes.CDLL | None:
    """The libgomp that torch computes with, if torch is loaded and brings one (Linux)."""
    torch = sys.modules.get("torch")
    return None if torch is None or torch.__file__ is None else _libgomp(torch.__file__)


@cache
def _libgomp(torch: str) -> ctypes.CDLL | None:
    for path in sorted((Path(torch).parent / "lib").glob("libgomp*.so*")):
        library = ctypes.CDLL(str(path))  # the very one that torch has open
        library.GOMP_parallel.argtypes = [_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
        return library
    return None


def _run_in(openmp: ctypes.CDLL, pieces: Sequence[Piece], work: Work) -> None:
    faults: list[BaseException] = []
    done: list[Piece] = []

    def body(_: int | None) -> None:
        try:
            # the team may be smaller than asked for: each thread takes every n-th piece
            for piece in pieces[openmp.omp_get_thread_num() :: openmp.omp_get_num_threads()]:
                work(*piece)
                done.append(piece)
        except BaseException as e:  # nothing may leave a callback
            faults.append(e)

    def keep(unraisable: Any) -> None:
        """What a signal's handler raises as a callback begins or ends: ctypes would print it and go on."""
        faults.append(unraisable.exc_value)

    before, callback = sys.unraisablehook, _BODY(body)
    try:  # no context manager: a handler that raises between its calls would leave the hook in place
        if threading.current_thread() is threading.main_thread():  # handlers run there alone
            sys.unraisablehook = keep
        openmp.GOMP_parallel(callback, None, len(pieces), 0)
    finally:
        sys.unraisablehook = before
    if len(done) < len(pieces) and not faults:
        raise KeyboardInterrupt
    if faults:
        try:
            raise faults[0]
        finally:
            faults.clear()  # it holds this frame, and the frame it


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cores(), thread_name_prefix="ggml")


def _run_on(pool: ThreadPoolExecutor, pieces: Sequence[Piece], work: Work) -> None:
    running = [pool.submit(work, *piece) for piece in pieces]
    try:
        for future in running:
            future.result()
    finally:
        wait(running)  # whoever leaves early, by a signal or a fault, takes no memory from the rest
