"""Mapped files: pages that were read stay in a process's memory until somebody lets them go."""

from __future__ import annotations

import mmap


def forget(mapped: mmap.mmap, offset: int, n_bytes: int) -> None:
    """Let the pages of a read-only map that hold these bytes go. They are read again where they are asked for again.

    Does nothing where the system has no such call (Windows).
    """
    if hasattr(mmap, "MADV_DONTNEED"):
        first = offset // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, first, offset + n_bytes - first)
