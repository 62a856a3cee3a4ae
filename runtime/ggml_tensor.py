"""How ggml lays out a tensor in memory (`struct ggml_tensor` of ggml.h): ctypes alone, no library is opened here."""

from __future__ import annotations

import ctypes

SIZE_BYTES = 336
F32 = 0  # ggml_type


class GGMLTensor(ctypes.Structure):
    """`ne`: elements and `nb`: bytes from one to the next, of each dimension, columns first. `src`: what it is of."""


GGMLTensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(GGMLTensor) * 10),
    ("view_src", ctypes.POINTER(GGMLTensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]
assert ctypes.sizeof(GGMLTensor) == SIZE_BYTES
