"""QLoRA of a Llama-3-8B shape on one NVIDIA GPU: tokens/s and peak memory against transformers + PEFT + bitsandbytes.

    .venv/bin/python benchmarks/gpu.py [--together] [--ragged] [--rounds 3] [--out benchmarks/results/gpu.json]

Random weights of the model's shape, built on the GPU without a checkpoint: NF4 on both sides, Q4_K on ours. LoRA of
rank 16 on every linear layer, rows of 2048 tokens, recomputation on both sides. What waits in the machine's memory is
each side's own: the peers' paged 8-bit moments; ours in float32, with the inputs of layers (`--offload`). Each side
has a process held to the memory of a consumer card; with `--together`, for a card that holds them all, the sides take
turns step by step. `--try` runs a tiny shape on the CPU, to see that the benchmark itself works: its numbers say
nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peers.channel import Side
from peers.gpu import SHAPES

from edgelora.device import physical_cores, processor_name

SPEED, MEMORY = 1.8, 0.6  # at least and at most, times the peer at the same limit
FREE = "free"  # held to nothing

# Layers computed again, their inputs in the machine's memory: `edgelora train --recompute full --offload`.
LEAN = {"recompute": True, "offload": True, "graphs": True, "optimizer": "adamw", "warm_up": 4}

# name → (program in peers/, settings)
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "edgelora, NF4": ("gpu_ours", {"held": "nf4", **LEAN}),
    "edgelora, Q4_K": ("gpu_ours", {"held": "q4_k", **LEAN}),
    "stack": ("gpu_stack", {"lean": False}),
    "stack, embedding and head in bf16": ("gpu_stack", {"lean": True}),
}
PEERS = [name for name, (program, _) in SIDES.items() if program == "gpu_stack"]

# Chats of many lengths over a small model, with passes recorded as CUDA graphs and launched one kernel at a time.
SMALL = {
    "shape": "smollm2-135m", "tokens": 8192, "held": "nf4", "ragged": True, "warm_up": 60, "recompute": False,
    "offload": False, "optimizer": "adamw",
}  # fmt: skip
RAGGED: dict[str, tuple[str, dict[str, Any]]] = {
    "recorded": ("gpu_ours", {**SMALL, "graphs": True}),
    "launched": ("gpu_ours", {**SMALL, "graphs": False}),
}
Sides = dict[str, list[dict[str, Any]]]  # what each side took, round after round
VERSIONS = ("torch", "triton", "transformers", "peft", "bitsandbytes")


def started(name: str, hold: str, args: argparse.Namespace, folder: Path) -> Side:
    """A side, built and warmed up, or out of memory."""
    program, settings = (SIDES | RAGGED)[name]
    where = {"shape": args.shape, "device": args.device, "tokens": args.tokens}
    given = {**where, **settings, "hold": None if hold == FREE else hold}
    if args.tried:
        given |= {**where, "offload": False, "warm_up": 2}
    return Side(program, given, folder / name.replace(" ", "-"), physical_cores())


def visits(names: Iterable[str], hold: str, args: argparse.Namespace, folder: Path) -> Sides:
    """What each side takes, round after round; the sides live at once and take turns."""
    found: Sides = {name: [] for name in names}
    with ExitStack() as stack, ThreadPoolExecutor(len(found)) as pool:
        sides = dict(zip(found, pool.map(lambda name: started(name, hold, args, folder), found), strict=True))
        for name, side in sides.items():
            if "out_of_memory" in side.facts:
                with side:  # it gives its memory back
                    found[name].append(dict(side.facts))
            else:
                stack.enter_context(side)
        for number in range(args.rounds):
            for name in (name for name in found if "out_of_memory" not in sides[name].facts):
                taken = sides[name].steps(args.steps)
                speed = taken["tokens"] / taken["seconds"]
                found[name].append({**sides[name].facts, **sides[name].do("peaks"), "tokens_per_s": speed})
                print(f"round {number + 1}, {hold}, {name}: {speed:.0f} tokens/s", file=sys.stderr, flush=True)
    return found


def summary(visits: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Medians over the rounds; None if a round ran out of memory."""
    if any("out_of_memory" in taken for taken in visits):
        return None
    return {key: median(taken[key] for taken in visits) for key in ("tokens_per_s", "used_bytes") if key in visits[0]}


def rows(found: dict[str, Sides]) -> list[dict[str, Any]]:
    """One row for each limit and side; ours are compared with the fastest peer that fits there."""
    table = []
    for hold, sides in found.items():
        means = {name: summary(visits) for name, visits in sides.items()}
        peers = [mean for name, mean in means.items() if name in PEERS and mean is not None]
        best = max(peers, key=lambda mean: float(mean["tokens_per_s"]), default=None)
        for name, mean in means.items():
            row: dict[str, Any] = {"hold": hold, "side": name, "fits": mean is not None, **(mean or {})}
            if name not in PEERS and mean is not None and best is not None:
                row["speed"] = mean["tokens_per_s"] / best["tokens_per_s"]
                row["met"] = row["speed"] >= SPEED
                if "used_bytes" in mean:
                    row["memory"] = mean["used_bytes"] / best["used_bytes"]
                    row["met"] = row["met"] and row["memory"] <= MEMORY
            elif name not in PEERS:
                row["met"] = mean is not None  # it runs where no peer does
            table.append(row)
    return table


def show(table: list[dict[str, Any]]) -> None:
    print(f"| held to | side | tokens/s | peak GB | times the peer's speed (≥ {SPEED}) | memory (≤ {MEMORY}) | |")
    print("|---|---|---:|---:|---:|---:|---|")
    for row in table:
        if not row["fits"]:
            cells = ["out of memory", "", "", ""]
        else:
            peak = f"{row['used_bytes'] / 1e9:.2f}" if "used_bytes" in row else "–"
            ratios = [f"{row[key]:.2f}" if key in row else "" for key in ("speed", "memory")]
            cells = [f"{row['tokens_per_s']:.0f}", peak, *ratios]
        verdict = "" if "met" not in row else "met" if row["met"] else "NOT MET"
        print(f"| {row['hold']} | {row['side']} | {' | '.join(cells)} | {verdict} |")


def versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def write(args: argparse.Namespace, card: str, found: dict[str, Sides], small: Sides) -> None:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "card": card, "processor": processor_name(), "shape": args.shape, "tokens": args.tokens, "rounds": args.rounds,
        "versions": versions(),
    }  # fmt: skip
    result = {**about, "rows": rows(found), "ragged": speeds(small), "visits": {**found, "ragged": small}}
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def speeds(small: Sides) -> dict[str, float]:
    """Median tokens/s of each way over ragged rows."""
    return {name: median(visit["tokens_per_s"] for visit in visits) for name, visits in small.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--hold", default=f"{FREE},12GB,8GB", help=f"memory limits; `{FREE}`: the whole card")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="of each side in a round, besides one that warms up")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--together", action="store_true", help="all sides of a limit live at once: on a large card")
    parser.add_argument("--ragged", action="store_true", help="chats over a small model, recorded and launched, too")
    parser.add_argument("--try", dest="tried", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.device = "cuda"
    if args.tried:
        args.device, args.shape, args.tokens, args.hold = "cpu", "tiny", 128, FREE
    elif not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU that torch can use; --try shows that it works without one")
    card = "no GPU: numbers say nothing" if args.tried else torch.cuda.get_device_name()
    print(f"{card}; {args.shape}, {args.tokens} tokens; {', '.join(f'{n} {v}' for n, v in versions().items())}\n")
    found: dict[str, Sides] = {}
    small: Sides = {}
    with tempfile.TemporaryDirectory() as folder:
        for hold in args.hold.split(","):
            groups = [SIDES] if args.together else [[name] for name in SIDES]
            found[hold] = {}
            for names in groups:
                found[hold] |= visits(names, hold, args, Path(folder))
            if args.out:  # what was measured is kept, whatever comes next
                write(args, card, found, small)
        if args.ragged:
            small = visits(RAGGED, FREE, args, Path(folder))
            if args.out:
                write(args, card, found, small)
    table = rows(found)
    if args.tried:
        table = [{key: value for key, value in row.items() if key != "met"} for row in table]
    show(table)
    for name, speed in speeds(small).items():
        print(f"\nragged rows, {name}: {speed:.0f} tokens/s")
    return 0 if all(row.get("met", True) for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
