"""Buffers that are used again: fresh memory costs a page fault every 4 KiB, each time."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")

_threads = threading.local()


def scratch(
    n_rows: int, columns: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU, use: str = "weight"
) -> Tensor:
    """(n_rows, columns) in this thread's buffer for `use`, which the next call for the same use overwrites."""
    buffers: dict[Any, Tensor] = _threads.__dict__  # a thread's own
    buffer = buffers.get((use, dtype, device))
    if buffer is None or buffer.numel() < n_rows * columns:
        buffer = buffers[use, dtype, device] = torch.empty(n_rows * columns, dtype=dtype, device=device)
    return buffer[: n_rows * columns].view(n_rows, columns)
