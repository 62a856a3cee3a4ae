"""Calls of the compiled code beside this file, on all cores. Imports no torch; uses its threads where it is loaded."""

from __future__ import annotations

import ctypes
import itertools
import struct
from functools import cache

from edgelora import team
from edgelora.kernels import load


def packed(name: str, *fields: float) -> bytes:
    """What a function is given: addresses, sizes and numbers, in the order of its C type's fields."""
    return struct.pack(load.JOBS[name], *fields)


def run(name: str, job: bytes | int, n_rows: int, pieces: int) -> None:
    """Compute rows of a job, `packed` or the address of one, in so many pieces side by side."""
    found = load.library()
    assert found is not None
    function = getattr(found, name)
    if pieces < 2:
        function(job, 0, n_rows)
    elif (openmp := team.shared_openmp()) is not None:
        # no Python on those threads: to wait for each other at its lock took them longer than most jobs do
        found.on_all_cores(_address_of(name), job, n_rows, pieces, *_entries(openmp))
    else:
        borders = [n_rows * i // pieces for i in range(pieces + 1)]
        team.run(list(itertools.pairwise(borders)), lambda first, last: function(job, first, last))


def address(function: ctypes._NamedFuncPointer) -> int:
    """Where a C function stands, as C takes it."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@cache
def _address_of(name: str) -> int:
    return address(getattr(load.library(), name))


@cache
def _entries(openmp: ctypes.CDLL) -> tuple[int, ...]:
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    return tuple(address(getattr(openmp, name)) for name in names)
