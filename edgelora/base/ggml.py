"""ggml's own kernels in-process: dequantize rows of blocks and quantize rows of floats, on all cores.

A door to llama.cpp that never imports llama_cpp: it opens the libggml-base which llama-cpp-python ships. ctypes
releases the GIL during a call, so rows are split over threads. Results are bit for bit ggml's. Where that library is
missing, gguf-py dequantizes to the same floats, and a line in the log says what it costs.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from functools import cache
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from edgelora.errors import BaseModelError, ExportError
from edgelora.kernels import call, load
from edgelora.team import run, shared_openmp, split

Type = GGMLQuantizationType

# The C symbol of each quantized type. F32, F16 and BF16 need no kernel.
DEQUANTIZE = {
    Type.Q4_0: "q4_0", Type.Q4_1: "q4_1", Type.Q5_0: "q5_0", Type.Q5_1: "q5_1", Type.Q8_0: "q8_0",
    Type.Q2_K: "q2_K", Type.Q3_K: "q3_K", Type.Q4_K: "q4_K", Type.Q5_K: "q5_K", Type.Q6_K: "q6_K",
    Type.IQ1_S: "iq1_s", Type.IQ1_M: "iq1_m", Type.IQ2_XXS: "iq2_xxs", Type.IQ2_XS: "iq2_xs", Type.IQ2_S: "iq2_s",
    Type.IQ3_XXS: "iq3_xxs", Type.IQ3_S: "iq3_s", Type.IQ4_NL: "iq4_nl", Type.IQ4_XS: "iq4_xs",
    Type.TQ1_0: "tq1_0", Type.TQ2_0: "tq2_0", Type.MXFP4: "mxfp4", Type.NVFP4: "nvfp4", Type.Q1_0: "q1_0",
}  # fmt: skip

FLOATS = (Type.F32, Type.F16, Type.BF16)

# ggml rounds activations to these types inside a product, and can dequantize Q8_K, but no file holds weights in them.
ACTIVATIONS = (Type.Q8_1, Type.Q8_K)

# Fewer floats are dequantized by one thread. Alone, one is as fast up to ten times as many; in a training step the
# product that follows is faster where each thread has written its half (over Q4_K once 1.02 against 1.06 times dense).
ELEMENTS_PER_THREAD = 1 << 17
POOL_FACTOR = 4  # without OpenMP's own threads a second one pays later still
QUANTIZED_PER_THREAD = 1 << 16  # quantizing costs 1 to 100 times more per weight
NARROWED_AT_ONCE = 1 << 16  # floats of a tile on its way to bfloat16: 256 KiB stay in a core's cache
ELEMENTS_AT_ONCE = 1 << 22  # floats alive while weights go from one type to another


PIN = "run `make quickstart`, or pip install llama-cpp-python==0.3.36"


def is_readable(kind: Type) -> bool:
    """Whether tensors of this type can become floats."""
    return kind in FLOATS or kind in DEQUANTIZE


def library_path() -> Path:
    """Where libggml-base lies inside llama-cpp-python. Raises BaseModelError if it is not installed."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is not None and spec.submodule_search_locations:
        folder = Path(next(iter(spec.submodule_search_locations))) / "lib"
        for name in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll"):
            if (folder / name).exists():
                return folder / name
    raise BaseModelError(
        what="libggml-base was not found",
        why="it comes with llama-cpp-python, which is not installed in this environment",
        fix=PIN,
    )


@cache
def _library() -> ctypes.CDLL:
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as e:
        raise BaseModelError(what=f"{path} could not be loaded", why=str(e), fix=PIN) from e
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_fp32_to_bf16_row.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    library.ggml_fp32_to_bf16_row.restype = None
    return library


@cache
def _dequantizer(kind: Type) -> ctypes._NamedFuncPointer | None:
    """ggml's function for rows of `kind`; None where gguf-py has to do it. Raises BaseModelError where neither can."""
    if kind not in DEQUANTIZE:
        raise BaseModelError(
            what=f"tensors of type {kind.name} cannot be read",
            why="ggml rounds activations to this type during a product; no model file holds weights in it"
            if kind in ACTIVATIONS
            else "ggml has no code that turns this type into floats",
            fix="use a file quantized to one of the usual types (Q4_0 … Q8_0, K-quants, IQ)",
        )
    try:
        function = _library()[f"dequantize_row_{DEQUANTIZE[kind]}"]
    except (BaseModelError, AttributeError) as e:
        _refuse_what_gguf_py_lacks(kind, e)
        _say_what_gguf_py_costs()
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    return function


def _own(kind: Type) -> ctypes._NamedFuncPointer | None:
    """edgelora's own function for rows of `kind` where it is faster (1.6 to 6 times): ggml's bits, or bfloat16."""
    compiled, name = load.library(), DEQUANTIZE[kind]
    return getattr(compiled, f"{name}_blocks") if compiled is not None and name in load.BLOCKS else None


def _refuse_what_gguf_py_lacks(kind: Type, missing: Exception) -> None:
    try:
        gguf.quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        raise BaseModelError(
            what=f"tensors of type {kind.name} cannot be read without libggml-base",
            why=f"gguf-py has no code for this type, and the library could not be opened: {missing.args[0]}",
            fix=PIN,
        ) from missing


@cache
def _say_what_gguf_py_costs() -> None:
    logging.getLogger(__name__).warning(
        "libggml-base could not be opened: gguf-py reads the weights, to the same floats but 4 to 40 times slower (%s)",
        PIN,
    )


def worth_a_thread() -> int:
    """How many weights make a second thread pay."""
    return ELEMENTS_PER_THREAD * (1 if shared_openmp() else POOL_FACTOR)


def row_bytes(kind: Type, columns: int) -> int:
    """Bytes of a row of `columns` weights, which must be whole blocks."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return columns // block * block_bytes


class Reader:
    """Rows of blocks, ready to become floats: what a training step asks for hundreds of times is looked up once.

    blocks: uint8 (n_rows, bytes per row), C-contiguous; it must not move while this lives.
    """

    def __init__(self, blocks: np.ndarray, kind: Type, columns: int) -> None:
        if not blocks.flags.c_contiguous or blocks.shape[1] != row_bytes(kind, columns):
            raise ValueError(f"blocks of shape {blocks.shape} are not contiguous rows of {columns} {kind.name} weights")
        self._blocks, self._kind, self._columns = blocks, kind, columns
        self._function, self._source, self._stride = _dequantizer(kind), blocks.ctypes.data, blocks.shape[1]
        own = _own(kind)
        self._own, self._ggml = (0 if f is None else call.address(f) for f in (own, self._function))
        self._sizes = columns, self._stride, row_bytes(kind, load.CHUNK)
        self._is_compiled = load.library() is not None and (self._own or self._ggml)

    def read(self, first: int, last: int, address: int, *, bfloat16: bool = False) -> None:
        """Write rows [first, last) to `address`, (last - first, columns) of float32 or bfloat16 (to the nearest)."""
        n, columns = last - first, self._columns
        pieces = split(n, n * columns, worth_a_thread())
        if self._is_compiled:
            source = self._source + first * self._stride
            job = call.packed("block_rows", self._own, self._ggml, source, address, *self._sizes, bfloat16)
            call.run("block_rows", job, n, len(pieces))
            return
        write = self._write_narrow if bfloat16 else self._write
        size = (2 if bfloat16 else 4) * columns

        def work(begin: int, end: int) -> None:
            write(first + begin, first + end, address + begin * size)

        run(pieces, work)

    def _write(self, first: int, last: int, address: int) -> None:
        n = (last - first) * self._columns
        if self._function is not None:
            self._function(self._source + first * self._stride, address, n)
        elif n:
            floats = np.ctypeslib.as_array((ctypes.c_float * n).from_address(address))
            floats[:] = gguf.quants.dequantize(self._blocks[first:last], self._kind).ravel()

    def _write_narrow(self, first: int, last: int, address: int) -> None:
        """A few rows at a time through float32 that stays in the cache."""
        step = max(1, NARROWED_AT_ONCE // self._columns)
        wide = np.empty(step * self._columns, np.float32)
        for begin in range(first, last, step):
            end = min(begin + step, last)
            self._write(begin, end, wide.ctypes.data)
            narrow = address + 2 * (begin - first) * self._columns
            _library().ggml_fp32_to_bf16_row(wide.ctypes.data, narrow, (end - begin) * self._columns)


def dequantize(blocks: np.ndarray, kind: Type, columns: int) -> np.ndarray:
    """Rows of blocks, uint8 (n_rows, bytes per row), as float32 (n_rows, columns). F32, F16 and BF16 pass through."""
    if kind == Type.F32:
        return blocks.view(np.float32)
    if kind == Type.F16:
        return blocks.view(np.float16).astype(np.float32)
    if kind == Type.BF16:
        return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    out = np.empty((len(blocks), columns), np.float32)
    Reader(blocks, kind, columns).read(0, len(blocks), out.ctypes.data)
    return out


def quantize(weights: np.ndarray, kind: Type, importance: np.ndarray | None = None) -> np.ndarray:
    """Quantize float32 (n_rows, columns) to blocks, uint8 (n_rows, bytes per row), as llama-quantize does.

    importance: float32 (columns,), the mean squared activation of each column, or None.
    Raises ExportError if rows do not divide into blocks of `kind`.
    """
    n_rows, columns = weights.shape
    if kind == Type.F32:
        return np.ascontiguousarray(weights, np.float32).view(np.uint8)
    if kind == Type.F16:
        return weights.astype(np.float16).view(np.uint8)
    block, _ = GGML_QUANT_SIZES[kind]
    if columns % block:
        raise ExportError(
            what=f"rows of {columns} weights cannot become {kind.name}",
            why=f"{kind.name} packs blocks of {block} weights and rows are never padded",
            fix="choose a type with smaller blocks, such as Q8_0 or Q4_0",
        )
    known = kind in DEQUANTIZE or kind == Type.BF16
    needs_importance = known and _library().ggml_quantize_requires_imatrix(int(kind))
    if not known or (needs_importance and importance is None):
        raise ExportError(
            what=f"weights cannot be quantized to {kind.name}",
            why="it needs the importance of each column" if needs_importance else "ggml has no quantizer for this type",
            fix="choose another type, such as Q4_0 or Q8_0",
        )
    if importance is not None and importance.shape != (columns,):
        raise ValueError(f"importance of shape {importance.shape} for rows of {columns} weights")
    function = _library().ggml_quantize_chunk
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    function.restype = ctypes.c_size_t
    source = np.ascontiguousarray(weights, np.float32)
    out = np.empty((n_rows, row_bytes(kind, columns)), np.uint8)
    hint = None if importance is None else np.ascontiguousarray(importance, np.float32)

    def work(first: int, last: int) -> None:
        function(
            int(kind), source.ctypes.data, out.ctypes.data, first * columns, last - first, columns,
            None if hint is None else hint.ctypes.data,
        )  # fmt: skip

    _library().ggml_quantize_init(int(kind))  # tables of the IQ types; does nothing the second time
    run(split(n_rows, n_rows * columns, QUANTIZED_PER_THREAD), work)
    return out


def requantize(
    rows: np.ndarray, kind: Type, columns: int, to: Type, importance: np.ndarray | None = None
) -> np.ndarray:
    """Rows stored as `kind`, uint8 (n_rows, bytes per row), stored as `to` instead: F16 and BF16 to blocks, or any two.

    A few rows at a time are floats, so that beside `rows`, which may be a mapped file, only the result is in memory.
    Raises what `dequantize` and `quantize` raise.
    """
    if kind == to:
        return rows
    out = np.empty((len(rows), row_bytes(to, columns)), np.uint8)
    step = max(1, ELEMENTS_AT_ONCE // columns)
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        out[part] = quantize(dequantize(rows[part], kind, columns), to, importance)
    return out
