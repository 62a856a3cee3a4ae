"""Launch Triton's kernels by a shorter way than Triton's own, which binds and examines the arguments anew each time.

That takes some 50 microseconds a launch, as long as a norm of two thousand tokens of an 8B model takes on a large card,
and a step of such a model has over a thousand of them. Here a compiled kernel is looked up by what Triton compiles anew
for, and called as Triton calls it. Imported only where Triton is.
"""

# mypy: disable-error-code="import-untyped, import-not-found"
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

_compiled: dict[Any, Any] = {}


def _kind(argument: Any) -> Any:
    """What of an argument Triton compiles a kernel for: dtype and alignment of a tensor, 1, multiples of 16, width."""
    kind = type(argument)
    if kind is int:
        return argument == 1, argument & 15 == 0, -(1 << 31) <= argument < 1 << 31
    if kind is float:
        return float
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() & 15 == 0
    return tuple(map(_kind, argument)) if isinstance(argument, tuple) else kind


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: tuple[Any, ...], warps: int = 4,
    contract: bool = True,
) -> None:  # fmt: skip
    """`kernel` over `grid` with its arguments, and its constants behind them.

    contract: whether a product and a sum may become one operation, which rounds once.
    """
    options = {"num_warps": warps, "enable_fp_fusion": contract}
    if not isinstance(kernel, JITFunction):  # interpreted
        kernel[grid](*arguments, *constants, **options)
        return
    named = [c if isinstance(c, int) else id(c) for c in constants]  # a kernel's own hash is slow, and it never dies
    device = torch._C._cuda_getDevice()
    key = (id(kernel), *named, warps, contract, device, *map(_kind, arguments))
    found = _compiled.get(key)
    if found is None:
        _compiled[key] = kernel[grid](*arguments, *constants, **options)
        return
    stream = torch._C._cuda_getCurrentRawStream(device)
    nobody = None, None, None  # who would hear of a launch
    found.run(*(*grid, 1, 1)[:3], stream, found.function, found.packed_metadata, *nobody, *arguments, *constants)
