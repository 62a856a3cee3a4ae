"""A GGUF → a smaller GGUF: by llama.cpp's own quantizer, or by a plan with ggml's kernels; both write the same bytes.

Both work in a child process of ours: llama.cpp and ggml abort on some faults, and that must not reach the caller.
`llama_model_quantize` chooses the type of each tensor, and its progress is its own log.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from converters.file_size import REWRITTEN, SPLIT_KEYS
from converters.in_range import in_range
from converters.metadata import copy_metadata, put
from converters.plan_check import check_importance, check_plan
from converters.quant_types import COPY, QUANT_TYPES, parse_tensor_type
from converters.stream import Entry, write_streamed
from edgelora.base import ggml
from edgelora.child import run_in_child
from edgelora.errors import ConfigError, ExportError
from edgelora.files.gguf import GGUFFile
from edgelora.files.split import open_gguf
from edgelora.progress import OnProgress, Pace, Progress, silent

if TYPE_CHECKING:
    from converters.plan import Plan, QuantizeOptions, TensorPlan  # plans are made through this door

ERROR_LEVEL = 4
MAX_KEY_BYTES = 127  # of a metadata value that llama.cpp is asked to add
ELEMENTS_AT_ONCE = 1 << 22  # floats alive while weights go from one type to another
ELSE = "quantize from another file of this model, or plan F32 or BF16 for this tensor"
_TENSOR_LINE = re.compile(r"\[ *(?P<n>\d+)/ *(?P<total>\d+)\] .+? +- \[(?P<shape>[\d, ]+)\], type")
_BAD_PATTERN = re.compile(r"regex|regular expression|expression contained", re.IGNORECASE)


@dataclass(frozen=True)
class _Job:
    """One call of llama_model_quantize."""

    source: Path
    out: Path
    options: QuantizeOptions
    keys: Mapping[str, str | float]
    elements: int = 0
    """Of all tensors, for the time that is left."""
    dry_run: bool = False


def dry_run(source: Path, options: QuantizeOptions) -> list[str]:
    """llama.cpp's log, line by line, of what it would do. It reads no tensor and writes nothing."""
    # that there is one decides types, its numbers do not
    known: dict[str, np.ndarray] | None = None if options.imatrix is None else {}
    job = _Job(source, source, replace(options, imatrix=known), {}, dry_run=True)
    return run_in_child(_quantize, job)


def write_quantized(
    source: Path,
    out: Path,
    options: QuantizeOptions,
    on_progress: OnProgress = silent,
    keys: Mapping[str, str | float] | None = None,
) -> None:
    """Quantize `source` to `out` (a staged path), byte for byte as llama-quantize does.

    keys: metadata to add, texts of at most 127 bytes. With `keep_split` the parts are `out`-00001-of-0000N.gguf.
    Raises ConfigError for a bad regular expression, ExportError with llama.cpp's last words.
    """
    file = open_gguf(source)
    elements = sum(info.elements for info in file.tensors.values())
    run_in_child(_quantize, _Job(file.path, out, options, keys or {}, elements), on_progress=on_progress)


def _quantize(job: _Job, on_progress: OnProgress) -> list[str]:
    import llama_cpp

    log = _Log()
    told = _Told(job, on_progress)

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def on_log(level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
        log.add(level, text.decode("utf-8", "replace"))
        told.follow(log.line)

    llama_cpp.llama_log_set(on_log, ctypes.c_void_p(0))
    params, alive = _parameters(llama_cpp, job)
    code = llama_cpp.llama_model_quantize(str(job.source).encode(), str(job.out).encode(), ctypes.byref(params))
    del alive  # what the parameters point to must live until here
    if code != 0:
        raise _failed(job, log)
    return log.lines


class _Log:
    """llama.cpp's log, which comes in pieces, as lines; `line` is the one that has not ended."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.errors: list[str] = []
        self.line = ""

    def add(self, level: int, text: str) -> None:
        *ended, self.line = (self.line + text).split("\n")
        self.lines += ended
        if level == ERROR_LEVEL and text.strip(" =\n"):
            self.errors.append(text.strip(" =\n"))


class _Told:
    """How far llama.cpp is: it names a tensor before it begins with it."""

    def __init__(self, job: _Job, on_progress: OnProgress) -> None:
        self.stage, self.on_progress = f"quantize {job.options.kind.upper()}", on_progress
        self.pace, self.tensor, self.elements = Pace(job.elements), 0, 0

    def follow(self, line: str) -> None:
        match = _TENSOR_LINE.match(line)
        if match and int(match["n"]) > self.tensor:
            eta = self.pace.step(0, self.elements)[1] if self.elements else None
            self.tensor, self.elements = int(match["n"]), prod(map(int, match["shape"].split(",")))
            self.on_progress(Progress(self.stage, self.tensor - 1, int(match["total"]), eta_s=eta))


def _parameters(llama_cpp: Any, job: _Job) -> tuple[Any, list[object]]:
    """The C structure, and what it points to."""
    options, params = job.options, llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = int(QUANT_TYPES[options.kind.upper()]), options.threads
    params.only_copy, params.pure = options.kind.upper() == COPY, options.pure
    params.keep_split, params.dry_run = options.keep_split, job.dry_run
    params.allow_requantize = True  # whether it is wanted was asked before
    if options.output_type is not None:
        params.output_tensor_type = int(parse_tensor_type(options.output_type))
    if options.embedding_type is not None:
        params.token_embedding_type = int(parse_tensor_type(options.embedding_type))
    patterns = [(pattern.encode(), int(parse_tensor_type(kind))) for pattern, kind in options.tensor_types]
    if patterns:
        params.tt_overrides = _array(llama_cpp.llama_model_tensor_override, patterns)
    if job.keys:
        params.kv_overrides = _array(llama_cpp.llama_model_kv_override, [_key(llama_cpp, *k) for k in job.keys.items()])
    weights = {name: np.ascontiguousarray(w, np.float32).reshape(-1) for name, w in (options.imatrix or {}).items()}
    if options.imatrix is not None:
        floats = ctypes.POINTER(ctypes.c_float)
        rows = [(name.encode(), w.ctypes.data_as(floats), w.size) for name, w in weights.items()]
        params.imatrix = _array(llama_cpp.llama_model_imatrix_data, rows)
    return params, [patterns, weights]


def _array(structure: Callable[..., Any], rows: list[tuple[Any, ...]]) -> Any:
    """C structures, and one of zeros that ends them."""
    return (structure * (len(rows) + 1))(*(structure(*row) for row in rows))  # type: ignore[operator]


def _key(llama_cpp: Any, key: str, value: str | float) -> tuple[Any, ...]:
    union = llama_cpp.llama_model_kv_override_value
    if isinstance(value, bool):
        return llama_cpp.LLAMA_KV_OVERRIDE_TYPE_BOOL, key.encode(), union(val_bool=value)
    if isinstance(value, float):
        return llama_cpp.LLAMA_KV_OVERRIDE_TYPE_FLOAT, key.encode(), union(val_f64=value)
    if isinstance(value, int):
        return llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, key.encode(), union(val_i64=value)
    if len(value.encode()) > MAX_KEY_BYTES:
        raise ValueError(f"{key}: llama.cpp adds texts of at most {MAX_KEY_BYTES} bytes")
    return llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, key.encode(), union(val_str=value.encode())


def _failed(job: _Job, log: _Log) -> ConfigError | ExportError:
    why = " | ".join(log.errors[-5:]) or "it said nothing"
    if job.options.tensor_types and _BAD_PATTERN.search(why):
        return ConfigError(
            what="--tensor-type: a pattern is no regular expression",
            why=why,
            fix=r"write it as in `--tensor-type 'ffn_down\.weight=Q6_K'`, quoted for your shell",
        )
    return ExportError(
        what=f"{job.source}: llama.cpp could not quantize it to {job.options.kind.upper()}",
        why=why,
        fix="check that the input is a whole model and that the disk has room",
    )


# -- by a plan, tensor by tensor -----------------------------------------------------------------------------------


def write_planned(
    source: Path,
    out: Path,
    plan: Plan,
    imatrix: Mapping[str, np.ndarray] | None = None,
    on_progress: OnProgress = silent,
    keys: Mapping[str, str | float] | None = None,
) -> None:
    """Quantize `source` to `out` (a staged path), each tensor to the type that `plan` says.

    The bytes are those of `write_quantized` where the types are the same, and of the whole file with the same `keys`.
    imatrix: by tensor, float32 (n_matrices * columns,). A few rows at a time are floats.
    Raises ConfigError if the plan is for another model; ExportError for importance that is missing or does not fit, and
    for a weight that is no number or does not fit into its type.
    """
    run_in_child(_write_planned, source, out, plan, imatrix, keys or {}, on_progress=on_progress)


def _write_planned(
    source: Path,
    out: Path,
    plan: Plan,
    imatrix: Mapping[str, np.ndarray] | None,
    keys: Mapping[str, str | float],
    on_progress: OnProgress,
) -> None:
    file = open_gguf(source)
    check_plan(plan, file.tensors)
    check_importance(plan, imatrix)
    writer = gguf.GGUFWriter(out, file.architecture)
    file_type = QUANT_TYPES[plan.kind]
    if plan.kind == COPY:
        file_type = file.get("general.file_type", int, file_type)
    copy_metadata(file, writer, leave_out=(*REWRITTEN, *SPLIT_KEYS))
    # llama.cpp, too, writes at the end what it states anew
    put(writer, dict(zip(REWRITTEN, (gguf.GGML_QUANT_VERSION, file_type), strict=True)) | dict(keys))
    tensors = {t.name: t for t in plan.tensors}
    entries = {name: Entry(t.shape, t.type) for name, t in tensors.items()}

    def rows_of(name: str) -> Iterator[np.ndarray]:
        yield from _rows(file, tensors[name], (imatrix or {}).get(name))
        file.forget(name)

    write_streamed(writer, entries, rows_of, f"quantize {plan.kind}", on_progress)


def _rows(file: GGUFFile, tensor: TensorPlan, importance: np.ndarray | None) -> Iterator[np.ndarray]:
    """The rows of a tensor as its planned type, some at a time and never of two experts."""
    rows, columns = file.rows(tensor.name), tensor.shape[-1]
    if tensor.type == tensor.source:
        yield rows
        return
    height = tensor.shape[-2]
    hints = [None] * (len(rows) // height) if importance is None else importance.reshape(-1, columns)
    step = max(1, ELEMENTS_AT_ONCE // columns)
    for matrix, hint in enumerate(hints):
        for first in range(matrix * height, (matrix + 1) * height, step):
            part = rows[first : min(first + step, (matrix + 1) * height)]
            weights = ggml.dequantize(part, tensor.source, columns)
            yield in_range(f"{tensor.name}: a weight", weights, tensor.type, hint, fix=ELSE)
