"""Tests of the engine with more of the same than the suite has time for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent


def _tests(name: str, **settings: str) -> dict[str, Any]:
    """Run tests with more of the same, in their own words."""
    words = [sys.executable, "-m", "pytest", "-q", "-rA", str(ROOT / "tests" / name)]
    start = time.perf_counter()
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stdout)
    said = [line for line in done.stdout.splitlines() if line.startswith("MEASURED ")]
    return {
        "seconds": round(time.perf_counter() - start, 1),
        **{k: v for m in said for k, v in json.loads(m[9:]).items()},
    }


def walk(_base: Path, _rounds: int) -> dict[str, Any]:
    return _tests("test_states.py", EDGELORA_WALK="500")


def cycles(_base: Path, _rounds: int) -> dict[str, Any]:
    return _tests("test_endurance.py", EDGELORA_CYCLES="10000")
