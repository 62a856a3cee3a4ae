"""Importing what takes long, in less time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Import torch and what stands on it in here: Python's garbage collector rests, and passes over it from then on.

    It would walk through the growing heap again and again and find nothing to free: a sixth of all the importing.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
