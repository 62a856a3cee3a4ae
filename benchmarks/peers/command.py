"""`edgelora train` itself, as one types it: how long until its first step begins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def seconds_to_first_step(base: Path, rows: Path, out: Path, threads: int) -> float:
    """From starting the process; bfloat16 products, and four rows a step, as all sides take them.

    When the first step is done it says so, and how many tokens a second it made: it began as much earlier.
    """
    words = [
        sys.executable, "-m", "edgelora", "train", base, rows, "--out", out, "--overwrite", "--max-steps", "1",
        "--batch-rows", "4", "--dtype", "bf16", "--device", "cpu", "--json",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    start, done = time.perf_counter(), None
    silent = subprocess.DEVNULL
    with subprocess.Popen(
        [str(w) for w in words], stdout=silent, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if done is None and json.loads(line).get("step") == 1:
                done = time.perf_counter()
    if process.returncode or done is None:
        raise SystemExit(f"edgelora train ended with {process.returncode}")
    first = json.loads((out.with_name(f"{out.name}.run") / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    return done - start - float(first["tokens"] / first["tokens_per_s"])
