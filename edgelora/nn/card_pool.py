"""Memory of a card that recorded passes run in (`graphs.py`); between them, what is large and gone soon lies there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lenders: list[Callable[[], Any]] = []


@contextmanager
def lends(pool: Callable[[], Any]) -> Iterator[None]:
    """In here, `lent` takes memory of the torch.cuda.MemPool that this gives, if it gives one."""
    _lenders.append(pool)
    try:
        yield
    finally:
        _lenders.remove(pool)


@contextmanager
def lent() -> Iterator[None]:
    """What this thread allocates in here lies in the memory of recorded passes, if there are any.

    It must be read for the last time before the next of them begins, which writes over it.
    """
    pool = _lenders[-1]() if _lenders else None
    if pool is None:
        yield
        return
    with torch.cuda.use_mem_pool(pool):
        yield
