"""How rows of tensors go through the compiled code of `kernels/`, and which can."""

from __future__ import annotations

import torch
from torch import Tensor

from edgelora import team
from edgelora.kernels import load

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
    """Call a function of `load.SIGNATURES` for rows of so many numbers, on all cores."""
    found = load.library()
    assert found is not None
    assert all(x.is_contiguous() for x in arguments if isinstance(x, Tensor))
    function = getattr(found, name)
    given = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    pieces = team.split(n_rows, n_rows * columns, WORTH_A_THREAD)
    team.run(pieces, lambda first, last: function(*given, first, last))
