"""Adapter over a quantized base, merged then quantized, or trained over the quantized base: which, at which level?

    .venv/bin/python benchmarks/which_way.py --room FOLDER [--jobs 2]    # goes on where it was stopped
    .venv/bin/python benchmarks/which_way.py --room FOLDER --status
    .venv/bin/python benchmarks/which_way.py --room FOLDER --write       # the page, from what is there

SmolLM2-135M is padded with zeros to 768 columns, so that K-quants are real, and dithered, so that the grid of its own
quantization flatters none. Ways, levels, tasks, seeds and learning rates are the tables of study/ways.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from study.room import Room

ROOT = Path(__file__).resolve().parent.parent
SUMMARY = ROOT / "benchmarks" / "results" / "which-way.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--room", type=Path, required=True, help="results and files, 1.5 GB at most")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "datasets")
    parser.add_argument("--base", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, a core for each")
    parser.add_argument("--status", action="store_true", help="say how far it is, and do nothing")
    parser.add_argument("--write", action="store_true", help="the summary and docs/which-way.md from what is there")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {args.core})  # before anything counts cores: what does takes one thread

    from study.room import Room

    args.room.mkdir(parents=True, exist_ok=True)
    room = Room(args.room.resolve(), args.data.resolve(), args.base.resolve())
    if args.job:
        from study.child import given
        from study.work import do

        do(given(args.job), room)
        return
    from study.jobs import plan_of_all
    from study.pool import Pool, state

    if args.write:
        write(room)
    elif not args.status:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(args.jobs))
        missing = Pool(room, Path(__file__).resolve(), plan_of_all, cores[: args.jobs]).run()
        if missing:
            sys.exit(f"not made: {', '.join(missing)}")
    found = state(room, plan_of_all)
    left = found.cpu_seconds_left / 60 / args.jobs
    print(f"{found.done} of {found.total} results; about {left:.0f} minutes left of {args.jobs} free cores")
    print(*found.failed, sep="\n", end="\n" * bool(found.failed))


def write(room: Room) -> None:
    """The summary, the page and its plot."""
    from study.jobs import plan_of_all
    from study.page import PLOT, svg, written
    from study.pool import state
    from study.summary import summary
    from study.ways import ways

    text = json.dumps(summary(room.found(), ways(), state(room, plan_of_all)), indent=1) + "\n"
    SUMMARY.write_text(text, encoding="utf-8")
    found = json.loads(text)
    (ROOT / "docs" / "which-way.md").write_text(written(found), encoding="utf-8")
    if found["levels"]:
        (ROOT / "docs" / PLOT).write_text(svg(found), encoding="utf-8")


if __name__ == "__main__":
    main()
