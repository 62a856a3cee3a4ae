"""A GGUF → a smaller GGUF through llama.cpp's own quantizer, in a child process of ours.

`llama_model_quantize` chooses the type of each tensor, and aborts the process on some faults: the child keeps that away
from the caller. Its progress is llama.cpp's own log.
"""

from __future__ import annotations

import ctypes
import re
from collections import deque
from pathlib import Path

from gguf.constants import LlamaFileType

from edgelora.child import run_in_child
from edgelora.errors import ConfigError, ExportError
from edgelora.progress import OnProgress, Pace, Progress, silent

# Types that need no importance matrix, by the names llama-quantize knows.
QUANT_TYPES: dict[str, LlamaFileType] = {
    name.removeprefix("MOSTLY_"): LlamaFileType[name]
    for name in (
        "MOSTLY_Q4_0", "MOSTLY_Q4_1", "MOSTLY_Q5_0", "MOSTLY_Q5_1", "MOSTLY_Q8_0", "MOSTLY_Q2_K", "MOSTLY_Q3_K_S",
        "MOSTLY_Q3_K_M", "MOSTLY_Q3_K_L", "MOSTLY_Q4_K_S", "MOSTLY_Q4_K_M", "MOSTLY_Q5_K_S", "MOSTLY_Q5_K_M",
        "MOSTLY_Q6_K", "MOSTLY_IQ4_NL", "MOSTLY_IQ4_XS", "MOSTLY_F16", "MOSTLY_BF16",
    )
}  # fmt: skip

_TENSOR_LINE = re.compile(r"^\[\s*(\d+)/\s*(\d+)\]")


def parse_type(name: str) -> LlamaFileType:
    """`q4_k_m` → llama.cpp's number for it. Raises ConfigError with the names there are."""
    kind = QUANT_TYPES.get(name.upper())
    if kind is None:
        raise ConfigError(
            what=f"{name}: no such quantization type",
            why="llama.cpp has no type of this name that works without an importance matrix",
            fix=f"choose one of {', '.join(QUANT_TYPES)}",
        )
    return kind


def write_quantized(source: Path, out: Path, name: str, threads: int, on_progress: OnProgress = silent) -> None:
    """Quantize `source` to `out` (a staged path) as type `name`. Raises ExportError with llama.cpp's last words."""
    run_in_child(_quantize, source, out, name.upper(), int(parse_type(name)), threads, on_progress=on_progress)


def _quantize(source: Path, out: Path, name: str, kind: int, threads: int, on_progress: OnProgress) -> None:
    import llama_cpp

    last: deque[str] = deque(maxlen=5)
    pace = Pace(0)

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def on_log(_level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
        line = text.decode("utf-8", "replace")
        if match := _TENSOR_LINE.match(line):
            pace.total, pace.done = int(match[2]), int(match[1]) - 1
            _, eta = pace.step(0)
            on_progress(Progress(f"quantize {name}", pace.done, pace.total, eta_s=eta))
        elif line.strip(" .\n"):
            last.append(line.strip())

    llama_cpp.llama_log_set(on_log, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = kind, threads
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params))
    if code != 0:
        raise ExportError(
            what=f"{source}: llama.cpp could not quantize it to {name} (code {code})",
            why=" | ".join(last) or "it said nothing",
            fix="check that the input is a whole F16, BF16 or F32 model and that the disk has room",
        )
