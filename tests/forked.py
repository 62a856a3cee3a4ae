"""`edgelora` in a process forked from one that has imported torch, for a test of many processes: no start-up."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgelora.child import expect_torch


def processes() -> Any:
    """multiprocessing's context of such processes; where nothing can be forked, of fresh ones."""
    return multiprocessing.get_context("forkserver" if expect_torch() else "spawn")


class Forked:
    """The command with these words, its talk in `log`; to be asked and killed as a Popen is.

    environment: of this process, with what stands here in place of its own.
    """

    def __init__(self, words: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        given = {**os.environ, **(environment or {})}
        self.process = processes().Process(target=talking_to, args=(log, words, given), daemon=True)
        self.process.start()
        self.kill = self.process.kill

    def poll(self) -> int | None:
        code: int | None = self.process.exitcode
        return code

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired("edgelora", timeout or 0)
        return code


def talking_to(log: Path, words: Sequence[str], environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with log.open("wb") as talk:
        for number in (1, 2):
            os.dup2(talk.fileno(), number)
    sys.argv[1:] = words
    from edgelora.__main__ import main

    main()
