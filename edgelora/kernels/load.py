"""The C code beside this file, compiled for this machine when edgelora was installed.

Each file does in one pass over memory what torch does in several. Nothing depends on it: where it could not be
compiled, whoever calls it computes the same another way, and tests hold the two to each other. Imports no torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import sys
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

CHUNK = 4096  # weights that block_rows takes at a time
HERE = Path(__file__).resolve().parent

_Pointer, _Size = ctypes.c_void_p, ctypes.c_int64
_WORK = [_Pointer, _Size, _Size]

# What each function is given, as `struct` packs the fields of its C type: P tensors, q sizes, d numbers.
JOBS = {
    "swiglu_forward": "PPPqq", "swiglu_backward": "PPPPPqq", "rms_norm_forward": "PPPPqqqd",
    "rms_norm_backward": "PPPPPqqqq", "rotary": "PPPPqqqqd", "residual": "PPPqqd", "scaled_copies": "Pq",
    "cross_entropy": "PPPqq", "products": "PPqqq", "nf4_blocks": "PPPPq", "block_rows": "PPPPqqqq",
}  # fmt: skip
ATTENTION = ("attention_forward", "attention_backward")  # of a `ctypes.Structure` (nn/flash.py)

# Types of blocks that have a function here, `NAME_blocks`.
BLOCKS = ("q4_0", "q4_1", "q5_0", "q5_1", "q2_K", "q3_K", "q6_K")


def sources() -> list[Path]:
    """The C files and headers; none where only the compiled code was installed."""
    return sorted((*HERE.glob("*.c"), *HERE.glob("*.h")))


def digest() -> str:
    """Of the C code: setup.py compiles it in, so that another version's is not called."""
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources())).hexdigest()[:16]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled code, if it is there, of this version and for this processor; else a line in the log says why."""
    found = next((path for suffix in EXTENSION_SUFFIXES if (path := HERE / f"native{suffix}").exists()), None)
    if found is None:
        return None  # as chosen at installation, where it was said
    try:
        return _opened(found)
    except (OSError, AttributeError, ValueError) as e:
        logging.getLogger(__name__).warning(
            "edgelora's compiled code is not used, and training on a CPU is slower: %s; install it again", e
        )
        return None


def _opened(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    for name in ("kernels_digest", "kernels_need"):
        getattr(found, name).restype = ctypes.c_char_p
    if sources() and found.kernels_digest().decode() != digest():
        raise ValueError("it was compiled from other code")
    needed = found.kernels_need().decode()
    if sys.platform == "linux" and needed and needed not in Path("/proc/cpuinfo").read_text(encoding="utf-8").split():
        raise ValueError(f"it was compiled for a processor with {needed}")
    for name in (*JOBS, *ATTENTION):
        getattr(found, name).argtypes, getattr(found, name).restype = _WORK, None
    found.on_all_cores.argtypes, found.on_all_cores.restype = [*[_Pointer] * 2, *[_Size] * 2, *[_Pointer] * 3], None
    found.narrow_row.argtypes, found.narrow_row.restype = [*[_Pointer] * 2, _Size], None
    found.attention_scratch.argtypes, found.attention_scratch.restype = [_Size, _Size], _Size
    for name in ("products_pay", "products_of"):
        getattr(found, name).argtypes, getattr(found, name).restype = [_Size], _Size
    found.attention_bytes.restype = _Size
    return found
