"""A child of the pool: the job that it was given, and its results, each kept at once with the CPU time that it took."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from edgelora.errors import EdgeloraError
from edgelora.training.interrupt import Stopped
from study.jobs import Job
from study.room import Room


def given(text: str) -> Job:
    """The job of `--job`."""
    job = json.loads(text)
    return Job(job["kind"], tuple(job["makes"]), tuple(job["needs"]))


def keep(room: Room, key: str, work: Callable[[], dict[str, Any]]) -> None:
    """Do it and keep what it gives; what cannot be trained or built is kept as failed, with its reason."""
    before = sum(os.times()[:4])  # with that of child processes; a clock would count what others do on this core
    try:
        result = work()
    except Stopped:
        raise  # by a signal: it is done again
    except EdgeloraError as e:
        result = {"failed": f"{e.what} ({e.why})"}
    room.keep(key, {**result, "cpu_seconds": round(sum(os.times()[:4]) - before, 2)})
