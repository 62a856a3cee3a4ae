"""How rows of tensors go through the compiled code of `kernels/`, and which can."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgelora import team
from edgelora.kernels import load

LANES = 16  # rows must divide into the longest vectors there are
NARROW = {torch.float32: False, torch.bfloat16: True}
WORTH_A_THREAD = 1 << 16  # numbers
PAIRS = 32  # columns that `narrow_product` turns at once


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


def multiplies(x: Tensor) -> bool:
    """Whether `narrow_product` can take these rows (m, k)."""
    return usable(x) and x.shape[-1] % PAIRS == 0 and panel() > 0


def narrow_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a (m, k) bᵀ (k, n) of bfloat16 numbers, summed in float32, into `out` (m, n): float32 rows, however far apart."""
    height, (m, k) = panel(), a.shape
    n_panels = len(b) // height
    assert a.dtype == b.dtype == torch.bfloat16
    assert a.is_contiguous()
    assert b.is_contiguous()
    assert out.shape == (m, len(b))
    assert out.stride(1) == 1
    assert out.dtype == torch.float32
    found = load.library()
    assert found is not None
    function: Any = found.narrow_product
    given = a.data_ptr(), b.data_ptr(), out.data_ptr(), m, k, out.stride(0)
    if n_panels:
        pieces = team.split(n_panels, n_panels * height * k, WORTH_A_THREAD)
        team.run(pieces, lambda first, last: function(*given, first, last))
    if rest := len(b) - n_panels * height:
        torch.mm(a.float(), b[-rest:].float().T, out=out[:, -rest:])
    return out


def panel() -> int:
    """How many rows of b `narrow_product` takes at once; 0 where this processor has no instruction for it."""
    found = load.library()
    return 0 if found is None else int(found.narrow_panel())
