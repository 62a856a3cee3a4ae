"""Rows of tensors on an NVIDIA GPU: whether Triton runs there, and which rows the kernels of `triton_rows.py` take."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 1 << 15  # numbers of a row that one program holds at once


@cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run there: an NVIDIA GPU of compute capability 8.0 or more, and the package."""
    if device.type != "cuda" or torch.version.hip is not None or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def usable(*tensors: Tensor) -> bool:
    """Whether rows of these can be computed by Triton, all on one GPU."""
    return has_triton(tensors[0].device) and all(
        x.device == tensors[0].device and x.dtype in DTYPES and x.shape[-1] <= WIDEST and x.numel() > 0 for x in tensors
    )


@cache
def kernels() -> Any:
    """`nn/triton_rows.py`, imported where it runs only."""
    from edgelora.nn import triton_rows

    return triton_rows
