"""What machine this is and what follows from it. Each choice is returned with its reason; nothing is measured here."""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Choice:
    """A decision and why it was taken; printed once and kept with the result."""

    value: str
    why: str


def choose_device() -> Choice:
    """Where training runs. This version computes on the CPU only and says so when a GPU is there."""
    import torch

    if torch.cuda.is_available():
        return Choice(
            "cpu", f"{torch.cuda.get_device_name()} is there, but block kernels are written for the CPU so far"
        )
    if torch.backends.mps.is_available():
        return Choice("cpu", "an Apple GPU is there, but block kernels are written for the CPU so far")
    return Choice("cpu", "no GPU that torch can use")


def choose_dtype() -> Choice:
    """The number format of matrix products in training."""
    return Choice("float32", "the training step is written for float32 so far; bfloat16 would be less precise")


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


def peak_memory_bytes() -> int:
    """The most resident memory this process has had."""
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
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or platform.machine()
