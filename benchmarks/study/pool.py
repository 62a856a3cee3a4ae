"""A few children at a time, each of one thread on a core of its own; what is done is kept whatever happens.

What there is to do is a study's own plan: which_way.py and methods.py have one each.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Protocol

from study.jobs import Job, Results, ready
from study.room import LOCK, Room

POLL_S = 0.5
ATTEMPTS = 2  # of a job that ended without its results


class Plan(Protocol):
    """All jobs that are known so far, in the order in which they should be done; `guess`: those too that depend on
    results, to count them."""

    def __call__(self, found: Results, /, *, guess: bool = False) -> list[Job]: ...


@dataclass
class Pool:
    """Children that are at work, by core; how often each job was tried. `script`: takes --room, --data, --base, --core
    and --job, and does that job."""

    room: Room
    script: Path
    plan: Plan
    cores: Sequence[int]
    tried: dict[tuple[str, ...], int] = field(default_factory=dict)
    working: dict[int, tuple[subprocess.Popen[bytes], Job]] = field(default_factory=dict)

    def run(self) -> list[str]:
        """Do all there is to do; the keys that could not be made."""
        with (self.room.folder / LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SystemExit(f"{self.room.folder}: a study or one of its jobs is at work there") from None
            while True:
                self._collect()
                jobs = self._due()
                for core in self.cores:
                    if core not in self.working and jobs:
                        self._start(core, jobs.pop(0), lock)
                if not self.working:
                    return sorted(key for makes in self.tried for key in makes if key not in self.room.found())
                time.sleep(POLL_S)

    def _due(self) -> list[Job]:
        found = self.room.found()
        busy = [key for _, job in self.working.values() for key in job.makes]
        return [job for job in ready(self.plan(found), found, busy) if self.tried.get(job.makes, 0) < ATTEMPTS]

    def _start(self, core: int, job: Job, lock: IO[str]) -> None:
        self.tried[job.makes] = self.tried.get(job.makes, 0) + 1
        words = [
            sys.executable, str(self.script), "--room", str(self.room.folder), "--data", str(self.room.data), "--base",
            str(self.room.source), "--core", str(core), "--job", json.dumps(asdict(job)),
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        # a child that outlives this process holds the lock until it has kept what it makes
        child = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, pass_fds=(lock.fileno(),))
        self.working[core] = (child, job)

    def _collect(self) -> None:
        for core, (child, job) in list(self.working.items()):
            if child.poll() is None:
                continue
            del self.working[core]
            said = "done" if child.returncode == 0 else f"FAILED ({child.returncode})"
            print(f"{time.strftime('%H:%M:%S')} {said} {job.kind} {', '.join(job.makes)}", flush=True)


@dataclass(frozen=True)
class State:
    """How far a study is: results made and all that are foreseen; CPU seconds that they took and that are left."""

    done: int
    total: int
    failed: list[str]
    cpu_seconds: float
    cpu_seconds_left: float


def state(room: Room, plan: Plan) -> State:
    """What is left, or was not timed, costs what results of the same kind took in the mean."""
    found = room.found()
    keys = {key: job.kind for job in plan(found, guess=True) for key in job.makes}
    took: dict[str, list[float]] = {}
    for key, kind in keys.items():
        if "cpu_seconds" in found.get(key, {}):
            took.setdefault(kind, []).append(found[key]["cpu_seconds"])
    mean = {kind: sum(some) / len(some) for kind, some in took.items()}
    spent = sum(found[key].get("cpu_seconds", mean.get(kind, 0.0)) for key, kind in keys.items() if key in found)
    left = sum(mean.get(kind, 0.0) for key, kind in keys.items() if key not in found)
    failed = [f"{key}: {result['failed']}" for key, result in found.items() if "failed" in result]
    return State(sum(key in found for key in keys), len(keys), failed, spent, left)
