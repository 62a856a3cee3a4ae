"""How the benchmark talks to a side: JSON lines in, JSON lines out, one side at work at a time. Imports no torch.

A side calls `begin` before each step and `end` after it. It waits in `begin` until it is told how many steps to do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgelora.device import peak_memory_bytes

BENCHMARKS = Path(__file__).resolve().parent.parent
Handler = Callable[[dict[str, Any]], dict[str, Any]]


class Turnstile:
    """A side's end. `handlers` answer what is asked besides steps; `facts` go with the first word to the benchmark."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # whatever a library prints belongs in the log
        self.handlers: dict[str, Handler] = {}
        self.facts: dict[str, Any] = {}
        self._left = 0
        self._ready = False
        self._counts: dict[str, float] = {}
        self._seconds = self._start = 0.0

    def begin(self) -> None:
        """Wait for the benchmark's word if no step is left to do. Ends the process when the benchmark is gone."""
        if not self._ready:
            self._ready = True
            self._say({"facts": self.facts})
        while not self._left:
            line = sys.stdin.readline()
            if not line:
                os._exit(0)  # a trainer in the middle of its loop has no other way out
            asked = json.loads(line)
            if "steps" in asked:
                self._left, self._counts, self._seconds = int(asked["steps"]), {}, 0.0
            else:
                self._say(self.handlers[asked.pop("do")](asked))
        self._start = time.perf_counter()

    def end(self, **counts: float) -> None:
        """Account for a step: its seconds, and `counts` (tokens, flops …), which are summed up."""
        self._seconds += time.perf_counter() - self._start
        for name, value in counts.items():
            self._counts[name] = self._counts.get(name, 0) + value
        self._left -= 1
        if not self._left:
            self._say({"seconds": self._seconds, **self._counts, "peak_bytes": peak_memory_bytes()})

    def _say(self, what: Mapping[str, Any]) -> None:
        print(json.dumps(what), file=self._answers, flush=True)


class Side:
    """The benchmark's end of one side, a child process that stays alive. Use it as a context manager.

    `seconds_to_first_step`: from starting the process until its first step could begin.
    `tree`: the benchmarks of the checkout whose code it runs.
    """

    def __init__(
        self, program: str, settings: Mapping[str, Any], log: Path, threads: int, tree: Path = BENCHMARKS
    ) -> None:
        environment = {
            **os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(tree.parent),
        }  # fmt: skip
        self._log = log
        start = time.perf_counter()
        with log.open("w", encoding="utf-8") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"peers.{program}", json.dumps(settings)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, text=True, cwd=tree, env=environment,
            )  # fmt: skip
        self.facts = self._hear()["facts"]
        self.seconds_to_first_step = time.perf_counter() - start

    def steps(self, count: int) -> dict[str, Any]:
        """Do `count` steps: `seconds`, `tokens`, `peak_bytes` and whatever else the side counts."""
        return self._ask({"steps": count})

    def do(self, what: str, **given: Any) -> dict[str, Any]:
        return self._ask({"do": what, **given})

    def _ask(self, what: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps(what), file=self._process.stdin, flush=True)
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            last = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
            raise SystemExit("\n".join([*last, f"a side died ({self._process.wait()}); its words: {self._log}"]))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:  # waits for it, and closes its pipes
            self._process.kill()


def run_once(program: str, settings: Mapping[str, Any]) -> None:
    """Run a program of this folder to its end."""
    subprocess.run([sys.executable, "-m", f"peers.{program}", json.dumps(settings)], cwd=BENCHMARKS, check=True)
