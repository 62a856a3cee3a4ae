"""Memory that is used again, or asked for so that it can be: a fresh one costs a page fault every 4 KiB, each time."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

CPU = torch.device("cpu")
LINE = 64  # bytes

_threads = threading.local()


def room(*sizes: int, dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
    """A new tensor with nothing in it yet.

    On a CPU torch asks for memory by posix_memalign, and before 2.38 glibc looks for a line more than that and never
    takes the place that just such a tensor left: the holes grew to a quarter of what a pass keeps. Here it is asked for
    a line more in the first place.
    """
    n = math.prod(sizes)
    if device.type != "cpu" or not n:
        return torch.empty(sizes, dtype=dtype, device=device)
    memory = np.empty(n * dtype.itemsize + LINE, np.uint8)
    return torch.frombuffer(memory, dtype=dtype, count=n, offset=-memory.ctypes.data % LINE).resize_(sizes)


def room_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`room` for what is shaped like x, contiguous."""
    return room(*x.shape, dtype=dtype or x.dtype, device=x.device)


def scratch(
    n_rows: int, columns: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU, use: str = "weight"
) -> Tensor:
    """(n_rows, columns) in this thread's buffer for `use`, which the next call for the same use overwrites."""
    buffers: dict[Any, Tensor] = _threads.__dict__  # a thread's own
    buffer = buffers.get((use, dtype, device))
    if buffer is None or buffer.numel() < n_rows * columns:
        buffer = buffers[use, dtype, device] = torch.empty(n_rows * columns, dtype=dtype, device=device)
    return buffer[: n_rows * columns].view(n_rows, columns)


def is_scratch(x: Tensor) -> bool:
    """Whether x lies in one of this thread's buffers."""
    memory = x.untyped_storage().data_ptr()
    return any(memory == buffer.untyped_storage().data_ptr() for buffer in _threads.__dict__.values())
