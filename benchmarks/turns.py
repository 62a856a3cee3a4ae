"""A training step of this checkout against another one's, in turns: what a change to the code did to speed and memory.

    git clone . ../before && git -C ../before checkout COMMIT
    (cd ../before && python setup.py build_ext --inplace)
    .venv/bin/python benchmarks/turns.py ../before --work FOLDER [--part ragged-bf16] [--rounds 5]

Both take the same steps, from `peers/ours.py` of their own checkout, in the environment of this one. `--work` is the
folder of `benchmarks/train.py`, which makes it. The parts are that benchmark's; of their sides only ours runs.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from peers.channel import BENCHMARKS, Side
from train import COMMON, OURS, PARTS

from edgelora.device import physical_cores


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("before", type=Path, help="the other checkout, its C code compiled")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", choices=list(PARTS), default="ragged-bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of each side in a round")
    args = parser.parse_args()
    sides = {name: side for name, side in PARTS[args.part].items() if name.startswith(OURS)}
    program, settings = next(iter(sides.values()))
    given = {**COMMON, **settings, "folder": str(args.work.resolve())}
    trees = {"before": args.before.resolve() / "benchmarks", "now": BENCHMARKS}
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(Side(program, given, args.work / f"{name}.log", physical_cores(), tree))
            for name, tree in trees.items()
        }
        for side in running.values():
            side.steps(1)  # warms up
        taken = [{name: side.steps(args.steps) for name, side in running.items()} for _ in range(args.rounds)]
    for name in trees:
        speed = median(one[name]["tokens"] / one[name]["seconds"] for one in taken)
        print(f"{name}: {speed:.0f} tokens/s, {taken[-1][name]['peak_bytes'] / 2**20:.0f} MiB")
    ratios = sorted(one["before"]["seconds"] / one["now"]["seconds"] for one in taken)
    print(f"{args.part}: {median(ratios):.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
