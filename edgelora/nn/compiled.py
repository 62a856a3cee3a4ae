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
    """Whether rows of these can be computed here."""
    return load.library() is not None and all(
        x.device.type == "cpu" and x.dtype in NARROW and x.shape[-1] % LANES == 0 for x in tensors
    )


def over_rows(name: str, like: Tensor, *arguments: Tensor | float) -> None:
    """Call a function of `load.SIGNATURES` for all rows of `like` (n, …), on all cores. Tensors are contiguous."""
    found = load.library()
    assert found is not None
    function = getattr(found, name)
    given = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    pieces = team.split(like.shape[0], like.numel(), WORTH_A_THREAD)
    team.run(pieces, lambda first, last: function(*given, first, last))
