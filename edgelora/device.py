"""What machine this is and what follows from it. Each choice is returned with its reason; nothing is measured here."""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from edgelora.errors import ConfigError


@dataclass(frozen=True)
class Choice:
    """A decision and why it was taken; printed once and kept with the result."""

    value: str
    why: str


def choose_device(asked: str = "auto") -> Choice:
    """Where training runs: `cpu`, `mps`, `cuda` or, of several, `cuda:1`. Raises ConfigError for what is not here."""
    import torch

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if asked != "auto":
        kind, numbered, number = asked.partition(":")
        if not there.get(kind, False):
            raise ConfigError(
                what=f"--device {asked}: there is none that torch can use",
                why=f"torch {torch.__version__} sees {', '.join(name for name, is_there in there.items() if is_there)}",
                fix="leave --device out, or install the build of torch for it (make quickstart TORCH=default)",
            )
        if numbered:
            _require_number(kind, number)
        return Choice(asked, "asked for")
    if there["cuda"]:
        return Choice("cuda", torch.cuda.get_device_name())
    if there["mps"]:
        return Choice("cpu", "an Apple GPU is there, but training on one was never measured: --device mps tries it")
    return Choice("cpu", "no GPU that torch can use")


def _require_number(kind: str, number: str) -> None:
    """Raise ConfigError unless `kind:number` is one of the cards that torch sees."""
    import torch

    if kind != "cuda":
        raise ConfigError(
            what=f"--device {kind}:{number}: there is one {kind}, and it has no number",
            why="only NVIDIA cards are counted",
            fix=f"pass --device {kind}",
        )
    cards = [str(i) for i in range(torch.cuda.device_count())]
    if number not in cards:
        raise ConfigError(
            what=f"--device {kind}:{number}: there is no such card",
            why=f"torch sees {', '.join(f'cuda:{card}' for card in cards)}",
            fix="pass one of these, or --device cuda",
        )


def card_of(device: str) -> int:
    """The number of the card that `cuda` or `cuda:1` is; without a number it is the one that is computed on."""
    import torch

    number = device.partition(":")[2]
    return int(number) if number else torch.cuda.current_device()


def choose_dtype(asked: str = "auto", device: str = "cpu") -> Choice:
    """The number format of matrix products: `bf16` where the hardware multiplies it faster than `f32`."""
    import torch

    if asked != "auto":
        return Choice(asked, "asked for")
    if device.startswith("cuda"):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return Choice("bf16", "this GPU has it") if fast else Choice("f32", "this GPU has no bfloat16")
    flags = processor_flags() & {"amx_bf16", "avx512_bf16"} if device == "cpu" else set()
    if flags:
        return Choice("bf16", f"this CPU multiplies it twice as fast ({', '.join(sorted(flags))})")
    return Choice("f32", "bfloat16 would be slower here and less precise")


def choose_products(device: str = "cpu") -> Choice:
    """Whose float32 products are used on a CPU: MKL's (`highest` to torch), or oneDNN's (`medium`)."""
    if device != "cpu" or "AuthenticAMD" not in _cpuinfo("vendor_id"):
        return Choice("highest", "torch's own choice")
    # `medium` would allow AMX to round to bfloat16; AMD's CPUs have none, and oneDNN then computes in full float32
    return Choice(
        "medium",
        "on AMD's Zen 5 oneDNN's float32 products are twice as fast as MKL's, on a Zen 4 no slower; others: unknown",
    )


@contextmanager
def computing(products: Choice, threads: int) -> Iterator[None]:
    """torch with these settings, and afterwards with those it had."""
    import torch

    before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision(products.value)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.set_num_threads(before[1])


def compute_threads() -> int:
    """How many threads torch gets: one for each core, or what OMP_NUM_THREADS says."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, int(asked)) if asked.isdigit() else physical_cores()


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once where Linux tells."""
    if sys.platform != "linux":
        return int(_output("sysctl", "-n", "hw.physicalcpu") or os.cpu_count() or 1)
    pairs = set()
    for cpu in os.sched_getaffinity(0):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            pairs.add(((topology / "physical_package_id").read_text(), (topology / "core_id").read_text()))
        except OSError:
            pairs.add((str(cpu), ""))
    return max(1, len(pairs))


def peak_memory_bytes(device: str = "cpu") -> int:
    """The most memory this process has had: resident, or of a CUDA card what torch took from it."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_reserved(device)
    # Linux hands ru_maxrss of the parent down through fork and exec; VmHWM is the process's own
    if hwm := _proc_bytes("/proc/self/status", "VmHWM:"):
        return hwm
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory_bytes() -> int | None:
    """Memory that new work can take without swapping, or None where the system does not say."""
    if available := _proc_bytes("/proc/meminfo", "MemAvailable:"):
        return available
    pages = dict(re.findall(r"Pages (free|inactive|speculative):\s+(\d+)", _output("vm_stat")))
    page_bytes = int(_output("sysctl", "-n", "hw.pagesize") or 4096)
    return sum(map(int, pages.values())) * page_bytes or None


def _proc_bytes(file: str, key: str) -> int | None:
    """A line `key  n kB` of one of Linux's own files, in bytes."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


def _output(*command: str) -> str:
    """What a system command prints; empty where there is no such command."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def processor_name() -> str:
    """The CPU's name for reports."""
    return (
        _cpuinfo("model name")
        or _output("sysctl", "-n", "machdep.cpu.brand_string")
        or platform.processor()
        or platform.machine()
    )


def processor_flags() -> set[str]:
    """What Linux says this CPU can do; empty elsewhere."""
    return set(_cpuinfo("flags").split())


@cache
def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.partition("\t")[0].strip() == key), "")
