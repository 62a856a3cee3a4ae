"""What the live engine costs and saves, each figure as a ratio to llama.cpp itself in the same run.

    .venv/bin/python benchmarks/live.py PIECE… [--base FILE] [--rounds 5] [--out benchmarks/results/live.json]

PIECE: overhead, switch, load, snapshot, threads, memory, server, walk, cycles; `all` for all. Each is measured in a
process of its own and replaces its part of the file. Its two sides take turns in every round; medians of rounds.
`walk` and `cycles` are tests (test_states.py, test_endurance.py) with 4 x 500 answers and 10,000 cycles. `server` needs
xllamacpp, which carries llama-server prebuilt for any CPU of its kind, so the side of one conversation is shown too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.endurance import cycles, walk
from engine.latency import load, overhead, snapshot, switch
from engine.resident import memory
from engine.throughput import server, threads

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="+", choices=[*PIECES, "all"])
    parser.add_argument("--base", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "live.json")
    parser.add_argument("--here", action="store_true", help="measure in this process and print (the child's side)")
    given = parser.parse_args()
    if given.here:
        print(json.dumps(PIECES[given.pieces[0]](given.base, given.rounds)))
        return
    if given.base is None:
        from edgelora.pipeline.quickstart import default_base

        given.base = default_base()
    for piece in PIECES if "all" in given.pieces else given.pieces:
        words = [sys.executable, __file__, piece, "--here", "--base", str(given.base), "--rounds", str(given.rounds)]
        with tempfile.TemporaryDirectory() as home:
            done = subprocess.run(
                words, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "EDGELORA_HOME": home}
            )
        _record(given.out, piece, json.loads(done.stdout.splitlines()[-1]))
    print(given.out.read_text())


def _record(out: Path, piece: str, found: dict[str, Any]) -> None:
    from edgelora.device import processor_name
    from edgelora.versions import versions

    kept = json.loads(out.read_text()) if out.exists() else {}
    kept = {name: part for name, part in kept.items() if name in PIECES} | {piece: found}
    about = {"processor": processor_name(), "cores": os.cpu_count(), "versions": versions()}
    out.write_text(
        json.dumps({"about": about, **{name: kept[name] for name in PIECES if name in kept}}, indent=2) + "\n"
    )


PIECES: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "overhead": overhead, "switch": switch, "load": load, "snapshot": snapshot, "threads": threads,
    "memory": memory, "server": server, "walk": walk, "cycles": cycles,
}  # fmt: skip

if __name__ == "__main__":
    main()
