"""How rows of tensors go through the compiled code of `kernels/`, and which can."""

from __future__ import annotations

import torch
from torch import Tensor

from edgelora import team
from edgelora.kernels import call, load

LANES = 16  # rows must divide into the longest vectors there are
NARROW = {torch.float32: False, torch.bfloat16: True}
WORTH_A_THREAD = 1 << 16  # numbers


def usable(*tensors: Tensor) -> bool:
    """Whether rows of these, all of one dtype, can be computed here."""
    return load.library() is not None and all(
        x.device.type == "cpu" and x.dtype in NARROW and x.dtype == tensors[0].dtype and x.shape[-1] % LANES == 0
        for x in tensors
    )


def over_rows(name: str, n_rows: int, columns: int, *arguments: Tensor | float) -> None:
    """Call a function of `load.JOBS` for rows of so many numbers, on all cores."""
    job = call.packed(name, *[_address(x) if isinstance(x, Tensor) else x for x in arguments])
    call.run(name, job, n_rows, len(team.split(n_rows, n_rows * columns, WORTH_A_THREAD)))


def _address(x: Tensor) -> int:
    assert x.is_contiguous()
    return x.data_ptr()
