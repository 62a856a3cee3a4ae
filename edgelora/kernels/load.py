"""The C code beside this file, compiled for this machine when edgelora was installed.

Each file does in one pass over memory what torch does in several. Nothing depends on it: where no compiler was at hand,
whoever calls it computes the same another way, and tests hold the two to each other. Imports no torch.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

_Pointer, _Size, _Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ROWS = [_Size, _Size]  # the first, and the last + 1

# The arguments of each function: tensors, sizes, numbers, and at last the rows that a thread takes.
SIGNATURES: dict[str, list[type[ctypes._SimpleCData[int]] | type[ctypes._SimpleCData[float]] | type[ctypes.c_void_p]]]
SIGNATURES = {
    "swiglu_forward": [*[_Pointer] * 3, *[_Size] * 2, *_ROWS],
    "swiglu_backward": [*[_Pointer] * 5, *[_Size] * 2, *_ROWS],
    "rms_norm_forward": [*[_Pointer] * 4, *[_Size] * 3, _Float, *_ROWS],
    "rms_norm_backward": [*[_Pointer] * 5, *[_Size] * 3, *_ROWS],
    "rotary": [*[_Pointer] * 4, *[_Size] * 4, _Float, *_ROWS],
    "cross_entropy": [*[_Pointer] * 3, *[_Size] * 2, *_ROWS],
    "attention_forward": [_Pointer, *_ROWS],  # here a thread, of how many
    "attention_backward": [_Pointer, *_ROWS],
    "nf4_blocks": [*[_Pointer] * 4, _Size, *_ROWS],
    "narrow_row": [*[_Pointer] * 2, _Size],
}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled code, if the installation could compile it."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"native{suffix}")
        if path.exists():
            found = ctypes.CDLL(str(path))
            for name, arguments in SIGNATURES.items():
                function = getattr(found, name)
                function.argtypes, function.restype = arguments, None
            found.attention_scratch.argtypes, found.attention_scratch.restype = [_Size, _Size], _Size
            found.attention_bytes.restype = _Size
            return found
    return None
