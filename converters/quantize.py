"""A GGUF → a smaller GGUF through llama.cpp's own quantizer, in a child process of ours.

`llama_model_quantize` chooses the type of each tensor and aborts the process on some faults; the child keeps that
away from the caller. It is this module run as a program; its progress is llama.cpp's own log.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import deque
from pathlib import Path

from gguf.constants import LlamaFileType

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
    kind = parse_type(name)
    command = [sys.executable, "-P", "-m", "converters.quantize", str(source), str(out), str(int(kind)), str(threads)]
    last: deque[str] = deque(maxlen=5)
    pace: Pace | None = None
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as child:
        assert child.stderr is not None
        for line in child.stderr:
            if match := _TENSOR_LINE.match(line):
                pace = pace or Pace(int(match[2]))
                pace.done = int(match[1]) - 1
                _, eta = pace.step(0)
                on_progress(Progress(f"quantize {name}", pace.done, pace.total, eta_s=eta))
            elif line.strip(" .\n"):
                last.append(line.strip())
    if child.returncode != 0:
        raise ExportError(
            what=f"{source}: llama.cpp could not quantize it to {name} (exit {child.returncode})",
            why=" | ".join(last) or "it said nothing",
            fix="check that the input is a whole F16, BF16 or F32 model and that the disk has room",
        )


def _main(source: str, out: str, ftype: str, threads: str) -> int:
    import ctypes

    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = int(ftype), int(threads)
    return int(llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params)))


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
