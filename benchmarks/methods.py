"""Every row of METHODS trained on SmolLM2-135M: how well each learns, and what it costs. Writes docs/methods.md.

    .venv/bin/python benchmarks/methods.py --room FOLDER [--jobs 1]    # goes on where it was stopped
    .venv/bin/python benchmarks/methods.py --room FOLDER --rows time   # a step of each; let nothing else run
    .venv/bin/python benchmarks/methods.py --room FOLDER --status
    .venv/bin/python benchmarks/methods.py --room FOLDER --write       # the results, and the page from them
    .venv/bin/python benchmarks/methods.py --page                      # the page from the recorded results

Over the Q4_1 file, or where a method changes weights, over the same weights held as float32; rows, tasks, seeds and
learning rates are the tables of learning/rows.py.
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
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "methods.json", ROOT / "docs" / "methods.md"


def main() -> None:
    args = asked()
    if args.core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {args.core})  # before anything counts cores: what does takes one thread
    if not args.page:
        with_room(args)
    if args.page or args.write:
        page()


def with_room(args: argparse.Namespace) -> None:
    from study.room import Room

    args.room.mkdir(parents=True, exist_ok=True)
    room = Room(args.room.resolve(), args.data.resolve(), args.base.resolve())
    if args.job:
        from learning.work import do
        from study.child import given

        do(given(args.job), room)
    elif args.rows == "time":
        from learning.timing import measure

        measure(room, *map(int, args.part.split("/")))
    elif args.write:
        write(room)
    else:
        learn(room, args.jobs, only_say=args.status)


def asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--room", type=Path, help="results and files, 2 GB at most")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "datasets")
    parser.add_argument("--base", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, a core for each")
    parser.add_argument("--rows", choices=("learn", "time"), default="learn", help="how they learn, or a step's time")
    parser.add_argument("--part", default="1/1", help="of the methods to time: 1/3, 2/3 and 3/3 are all of them")
    parser.add_argument("--status", action="store_true", help="say how far it is, and do nothing")
    parser.add_argument("--write", action="store_true", help="results/methods.json and the page from what is there")
    parser.add_argument("--page", action="store_true", help="docs/methods.md from results/methods.json alone")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.room is None and not args.page:
        parser.error("--room FOLDER, where results are kept")
    return args


def learn(room: Room, jobs: int, *, only_say: bool) -> None:
    from learning.jobs import plan
    from study.pool import Pool, state

    if not only_say:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(jobs))
        missing = Pool(room, Path(__file__).resolve(), plan, cores[:jobs]).run()
        if missing:
            sys.exit(f"not made: {', '.join(missing)}")
    found = state(room, plan)
    print(f"{found.done} of {found.total} results; about {found.cpu_seconds_left / 60 / jobs:.0f} minutes left", end="")
    print(f" of {jobs} free cores", *found.failed, sep="\n")


def write(room: Room) -> None:
    from learning.jobs import plan
    from learning.summary import summary
    from study.pool import state

    text = json.dumps(summary(room.found(), state(room, plan)), indent=1, ensure_ascii=False) + "\n"
    RESULTS.write_text(text, encoding="utf-8")


def page() -> None:
    from learning.page import written

    PAGE.write_text(written(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
