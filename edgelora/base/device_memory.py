"""Hold this process to a part of an NVIDIA GPU's memory, so that a large card shows what a small one would do."""

from __future__ import annotations

import os
import platform
import re
import sys

import torch

from edgelora.device import Choice, card_of
from edgelora.errors import ConfigError

UNITS = {"GB": 10**9, "GiB": 1 << 30, "MB": 10**6, "MiB": 1 << 20}
PATTERN = re.compile(rf"(\d+(?:\.\d+)?)\s*({'|'.join(UNITS)})")


def parse_size(text: str) -> int:
    """`8GB`, `7.5 GiB`, `800MB` in bytes. Raises ConfigError for anything else, and for nothing."""
    found = PATTERN.fullmatch(text.strip())
    size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if size == 0:
        raise ConfigError(
            what=f"{text}: no amount of memory",
            why=f"it is a number above 0 and a unit, one of {', '.join(UNITS)}",
            fix="write it as in --max-gpu-memory 8GB",
        )
    return size


def grow_in_place(device: str) -> None:
    """Have torch's allocator enlarge what it has taken of a card, where it would take another piece beside it: rows of
    ever other lengths leave few holes then. Whoever has set PYTORCH_CUDA_ALLOC_CONF is left alone."""
    said = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys()
    is_linux = sys.platform == "linux" and "microsoft" not in platform.release().lower()  # of Windows: not there
    if device.startswith("cuda") and is_linux and not said:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def hold_to(max_gpu_memory: str, device: str = "cuda") -> Choice:
    """Let torch's allocator take no more than `max_gpu_memory` of the card `device`: beyond it, torch.OutOfMemoryError.

    Counts what torch allocates, and keeps to allocate again, in this process: not the CUDA context (718 MB
    on an NVIDIA H100) and not what other libraries allocate themselves, such as bitsandbytes' paged optimizer.
    Raises ConfigError as `held_bytes` does.
    """
    size, index = held_bytes(max_gpu_memory, device), card_of(device)
    card = torch.cuda.get_device_properties(index)
    torch.cuda.set_per_process_memory_fraction(size / card.total_memory, index)
    return Choice(f"{size / 1e9:g} GB", f"asked for; {card.name} has {card.total_memory / 1e9:.2f} GB")


def held_bytes(max_gpu_memory: str, device: str = "cuda") -> int:
    """What `hold_to` would leave of the card. Raises ConfigError if the text is no amount, `device` is no NVIDIA card
    that is here, or it is smaller."""
    size = parse_size(max_gpu_memory)
    if not device.startswith("cuda"):
        raise ConfigError(
            what=f"--max-gpu-memory {max_gpu_memory}: this run computes on {device}",
            why="only CUDA can hold a process to a part of a card's memory",
            fix="leave --max-gpu-memory out, or pass --device cuda where there is such a card",
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            what=f"--max-gpu-memory {max_gpu_memory}: there is no NVIDIA GPU here that torch can use",
            why="only CUDA can hold a process to a part of a card's memory",
            fix="leave --max-gpu-memory out, or install torch for CUDA where there is such a card",
        )
    card = torch.cuda.get_device_properties(card_of(device))
    if size > card.total_memory:
        raise ConfigError(
            what=f"--max-gpu-memory {max_gpu_memory}: {card.name} has {card.total_memory / 1e9:.2f} GB",
            why="a process cannot be given more than the card has",
            fix=f"pass at most --max-gpu-memory {card.total_memory // 10**7 / 100:g}GB, or leave it out",
        )
    return size
