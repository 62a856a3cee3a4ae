"""A GGUF → a smaller GGUF through llama.cpp's own quantizer, in a child process of ours.

`llama_model_quantize` chooses the type of each tensor, and aborts the process on some faults: the child keeps that away
from the caller. Its progress is llama.cpp's own log.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.quant_types import COPY, QUANT_TYPES, parse_tensor_type
from edgelora.child import run_in_child
from edgelora.errors import ConfigError, ExportError
from edgelora.progress import OnProgress, Pace, Progress, silent

if TYPE_CHECKING:
    from converters.plan import QuantizeOptions  # plans are made through this door

ERROR_LEVEL = 4
MAX_KEY_BYTES = 127  # of a metadata value that llama.cpp is asked to add
_TENSOR_LINE = re.compile(r"^\[\s*(\d+)/\s*(\d+)\]")
_BAD_PATTERN = re.compile(r"regex|regular expression|expression contained", re.IGNORECASE)


@dataclass(frozen=True)
class _Job:
    """One call of llama_model_quantize."""

    source: Path
    out: Path
    options: QuantizeOptions
    keys: Mapping[str, str | int]
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
    keys: Mapping[str, str | int] | None = None,
) -> None:
    """Quantize `source` to `out` (a staged path), byte for byte as llama-quantize does.

    keys: metadata to add, texts of at most 127 bytes. With `keep_split` the parts are `out`-00001-of-0000N.gguf.
    Raises ConfigError for a bad regular expression, ExportError with llama.cpp's last words.
    """
    run_in_child(_quantize, _Job(source, out, options, keys or {}), on_progress=on_progress)


def _quantize(job: _Job, on_progress: OnProgress) -> list[str]:
    import llama_cpp

    log, pace = _Log(), Pace(0)

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def on_log(level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
        log.add(level, text.decode("utf-8", "replace"))
        if (match := _TENSOR_LINE.match(log.line)) and int(match[1]) > pace.done + 1:
            pace.total = int(match[2])
            _, eta = pace.step(0)
            on_progress(Progress(f"quantize {job.options.kind.upper()}", pace.done, pace.total, eta_s=eta))

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


def _key(llama_cpp: Any, key: str, value: str | int) -> tuple[Any, ...]:
    union = llama_cpp.llama_model_kv_override_value
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
