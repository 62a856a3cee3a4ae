"""The code of layers.c and attention.c, compiled when edgelora was installed: whether it is there, and how to call it.

It does in one pass over memory what torch does in five, on a CPU and for float32 and bfloat16. Where no compiler was at
hand, and for everything else, the functions beside each use of it compute the same through torch.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from edgelora import team

LANES = 16  # rows must divide into the longest vectors there are
NARROW = {torch.float32: False, torch.bfloat16: True}
WORTH_A_THREAD = 1 << 16  # numbers

_Pointer, _Size, _Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ROWS = [_Size, _Size]  # the first, and the last + 1

# The arguments of each function: tensors, sizes, numbers, and at last the rows that a thread takes.
SIGNATURES = {
    "swiglu_forward": [*[_Pointer] * 3, *[_Size] * 2, *_ROWS],
    "swiglu_backward": [*[_Pointer] * 5, *[_Size] * 2, *_ROWS],
    "rms_norm_forward": [*[_Pointer] * 4, *[_Size] * 3, _Float, *_ROWS],
    "rms_norm_backward": [*[_Pointer] * 5, *[_Size] * 3, *_ROWS],
    "rotary": [*[_Pointer] * 4, *[_Size] * 4, _Float, *_ROWS],
    "cross_entropy": [*[_Pointer] * 3, *[_Size] * 2, *_ROWS],
    "attention_forward": [_Pointer, *_ROWS],  # here a thread, of how many
    "attention_backward": [_Pointer, *_ROWS],
}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled code, if the installation could compile it."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"kernels{suffix}")
        if path.exists():
            found = ctypes.CDLL(str(path))
            for name, arguments in SIGNATURES.items():
                function = getattr(found, name)
                function.argtypes, function.restype = arguments, None
            found.attention_scratch.argtypes, found.attention_scratch.restype = [_Size, _Size], _Size
            found.attention_bytes.restype = _Size
            return found
    return None


def usable(*tensors: Tensor) -> bool:
    """Whether rows of these can be computed here."""
    return library() is not None and all(
        x.device.type == "cpu" and x.dtype in NARROW and x.shape[-1] % LANES == 0 for x in tensors
    )


def over_rows(name: str, like: Tensor, *arguments: Tensor | float) -> None:
    """Call a function of SIGNATURES for all rows of `like` (…, columns), on all cores. Tensors must be contiguous."""
    found = library()
    assert found is not None
    function, n_rows = getattr(found, name), like.shape[0]
    given = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    team.run(team.split(n_rows, like.numel(), WORTH_A_THREAD), lambda first, last: function(*given, first, last))
