"""How long threads of llama.cpp spin while they wait for one another: bounded, before libgomp is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

SPINS = "1000"
"""Of a thread before it sleeps. libgomp's own 300,000 are a millisecond at each step of the graph in which a thread
that waits keeps the one it waits for from running, once more threads want to run than there are cores."""
VARIABLE = "GOMP_SPINCOUNT"
CHOSEN = ("OMP_WAIT_POLICY", VARIABLE)  # whoever sets one of these has chosen


@contextmanager
def bounded_spin() -> Iterator[None]:
    """What loads libgomp inside this block waits so. It changes nothing where libgomp is loaded, nor for children."""
    if any(name in os.environ for name in CHOSEN):
        yield
        return
    os.environ[VARIABLE] = SPINS
    try:
        yield
    finally:
        del os.environ[VARIABLE]
