"""llama.cpp's graph at work: each step of a decode with its operands."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import numpy as np

from edgelora.base.ggml import PIN, library_path
from edgelora.errors import EngineError
from runtime.ggml_tensor import F32, SIZE_BYTES, GGMLTensor

OBJECT_BYTES = 32  # what ggml keeps beside each tensor: sizeof(struct ggml_object)


class Product:
    """A step of the graph that llama.cpp is computing, as its eval callback shows it. Its end is the callback's end."""

    def __init__(self, address: int) -> None:
        self._node = ctypes.cast(address, ctypes.POINTER(GGMLTensor)).contents

    @property
    def operation(self) -> str:
        """`MUL_MAT`, `MUL_MAT_ID` (each token by experts of its own), `ADD` …"""
        return str(ggml().ggml_op_name(self._node.op).decode())

    @property
    def weight(self) -> str:
        """The name of its first operand; several devices add their own: `CUDA0#blk.0.attn_k.weight#0`."""
        if not self._node.src[0]:
            return ""
        name: bytes = self._node.src[0].contents.name
        return (name.split(b"#")[1] if b"#" in name else name).decode("utf-8", "replace")

    def input(self) -> np.ndarray | None:
        """What the weight is multiplied with: float32 (n3, n2, n1, columns), a copy; None if it is not in float32."""
        return self._read(1, np.float32) if self._node.src[1].contents.type == F32 else None

    def experts(self) -> np.ndarray:
        """Which experts each token goes to, of a MUL_MAT_ID: int32 (T, k)."""
        ids: np.ndarray = self._read(2, np.int32)[0, 0]
        return ids

    def _read(self, operand: int, dtype: type) -> np.ndarray:
        pointer = self._node.src[operand]
        tensor = pointer.contents
        shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
        n_bytes = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + np.dtype(dtype).itemsize
        raw = np.empty(n_bytes, np.uint8)
        ggml().ggml_backend_tensor_get(pointer, raw.ctypes.data, 0, n_bytes)  # from whatever device it is on
        return np.ndarray(shape, dtype, raw, strides=strides)


Watch = Callable[[Product, bool], bool]
"""watch(step, ask): whether it wants this step (ask), then a look at it once it is computed (not ask)."""


@cache
def ggml() -> ctypes.CDLL:
    """libggml-base, which llama.cpp has loaded. Raises EngineError if its tensors are not the ones known here."""
    library = ctypes.CDLL(str(library_path()))
    library.ggml_tensor_overhead.restype = ctypes.c_size_t
    library.ggml_op_name.restype = ctypes.c_char_p
    library.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    library.ggml_backend_tensor_get.restype = None
    if (found := library.ggml_tensor_overhead() - OBJECT_BYTES) != SIZE_BYTES:
        raise EngineError(
            what="this llama.cpp cannot be watched at work",
            why=f"its tensors take {found} bytes each, {SIZE_BYTES} are known here",
            fix=PIN,
        )
    return library
