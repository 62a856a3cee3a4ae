"""Training against what people use: TRL's SFTTrainer, transformers + PEFT in a plain loop, and bitsandbytes NF4.

    .venv/bin/python benchmarks/train.py [--rows PART,PART] [--rounds 5] [--out benchmarks/results/train.json]

SmolLM2-135M, LoRA of rank 16 on every linear layer, ragged chats, 4 rows a step, all sides over the same bf16 weights.
Each side is a process that stays alive; they take the same steps in turns, and the medians over rounds are compared.
Part by part (`--rows`) no run takes ten minutes; `--out` keeps what other parts recorded there before, and `--work`
keeps the checkpoint and the data between runs. With --rows "" what was recorded is shown.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peers import data
from peers.channel import Side, run_once
from peers.command import seconds_to_first_step
from peers.gradients import errors, write_adapter
from peers.table import table

from edgelora.base.model import open_base
from edgelora.device import physical_cores, processor_name

PEERS = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")
COMMON = {
    "model": "model", "data": "chats", "batch": data.BATCH, "seed": None, "total": 1000, "held": "auto", "dtype": "f32",
    "precision": "f32", "onednn": False, "micro_batch_tokens": 768, "recompute": False,
}  # fmt: skip
FULL = {"batch": 1}  # a full row at a time: the harder case for memory, there is nothing to split
WIDE = {"model": "model-768"}
OURS = "edgelora"

# part → side → (program in peers/, settings)
PARTS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "ragged-bf16": {
        "trl": ("trl_sft", {}),
        "stack": ("stack", {"precision": "bf16"}),
        OURS: ("ours", {"dtype": "bf16"}),
        f"{OURS}, 512": ("ours", {"dtype": "bf16", "micro_batch_tokens": 512}),
        f"{OURS}, least": ("ours", {"dtype": "bf16", "micro_batch_tokens": 256, "recompute": True}),
    },
    "ragged-f32": {
        "stack": ("stack", {}),
        "stack, oneDNN": ("stack", {"onednn": True}),
        OURS: ("ours", {}),
    },
    "full-512": {
        "stack": ("stack", {"precision": "bf16", "data": "full-512", **FULL}),
        OURS: ("ours", {"dtype": "bf16", "data": "full-512", **FULL}),
    },
    "full-1024": {
        "stack": ("stack", {"precision": "bf16", "data": "full-1024", **FULL}),
        OURS: ("ours", {"dtype": "bf16", "data": "full-1024", **FULL}),
    },
    "4bit": {
        "stack": ("stack", {"precision": "nf4"}),
        **{f"{OURS}, {held}": ("ours", {"dtype": "bf16", "held": held}) for held in ("q4_0", "q8_0", "nf4")},
    },
    "4bit-768": {
        "stack": ("stack", {"precision": "nf4", **WIDE}),
        f"{OURS}, q4_k": ("ours", {"dtype": "bf16", "held": "q4_k", **WIDE}),
    },
}  # fmt: skip
PEAK = {"f32": ("ours", {}), "bf16": ("ours", {"dtype": "bf16"})}
GRADIENTS = {
    "stack f32": ("stack", {}),
    "stack bf16": ("stack", {"precision": "bf16"}),
    "stack autocast": ("stack", {"precision": "autocast"}),
    f"{OURS} f32": ("ours", {}),
    f"{OURS} bf16": ("ours", {"dtype": "bf16"}),
}  # fmt: skip
PROFILES: dict[str, tuple[str, dict[str, Any]]] = {
    "ragged, bf16": ("ours", {"dtype": "bf16"}),
    "ragged, f32": ("ours", {}),
    "full rows of 1024, bf16": ("ours", {"dtype": "bf16", "data": "full-1024", **FULL}),
    "ragged, Q4_0": ("ours", {"dtype": "bf16", "held": "q4_0"}),
}  # fmt: skip
LEARNING = {"stack": ("stack", {"precision": "bf16"}), OURS: ("ours", {"dtype": "bf16"})}


class Bench:
    """The files that all sides read, and how sides are started and measured."""

    def __init__(self, work: Path, gguf: Path | None, args: argparse.Namespace) -> None:
        self.work, self.args = work, args
        work.mkdir(parents=True, exist_ok=True)
        done = work / "facts.json"
        if not done.exists():
            if gguf is None:
                from edgelora.pipeline.quickstart import default_base

                gguf = default_base()
            for name, width in (("model", None), ("model-768", 768)):
                run_once("checkpoint", {"gguf": str(gguf), "folder": str(work / name), "width": width})
            facts = data.write(open_base(work / "model"), work)
            done.write_text(json.dumps(asdict(facts)), encoding="utf-8")
        self.facts = json.loads(done.read_text(encoding="utf-8"))

    def start(self, name: str, side: tuple[str, dict[str, Any]], **given: Any) -> Side:
        program, settings = side
        log = self.work / f"{name.replace(', ', '-').replace(' ', '-')}.log"
        return Side(program, {**COMMON, **settings, **given, "folder": str(self.work)}, log, self.args.threads)

    def steps(self, sides: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
        """Every side takes the same steps in turns; the first one warms up and is not counted."""
        with ExitStack() as stack:
            running = {name: stack.enter_context(self.start(name, side)) for name, side in sides.items()}
            warm = {name: side.steps(1) for name, side in running.items()}
            rounds = [
                {name: side.steps(self.args.steps) for name, side in running.items()} for _ in range(self.args.rounds)
            ]
            for taken in (warm, *rounds):
                if len({side["tokens"] for side in taken.values()}) != 1:
                    raise SystemExit(f"the sides do not see the same tokens: {taken}")
            return {"facts": {name: side.facts for name, side in running.items()}, "rounds": rounds}

    def starts(self) -> dict[str, Any]:
        """Seconds from the command to where the first step begins: TRL's script, and `edgelora train`."""
        found: dict[str, list[float]] = {"trl": [], OURS: []}
        model, rows, out = self.work / "model", self.work / "messages.jsonl", self.work / "started"
        for _ in range(self.args.rounds + 1):  # the first warms the file cache
            with self.start("trl", ("trl_sft", {})) as running:
                found["trl"].append(running.seconds_to_first_step)
            found[OURS].append(seconds_to_first_step(model, rows, out, self.args.threads))
        return {"seconds": {name: seconds[1:] for name, seconds in found.items()}}

    def peak(self) -> dict[str, Any]:
        """The machine's best products and the step's, in turns."""
        tokens = int(self.facts["mean_tokens"] * data.BATCH)
        with ExitStack() as stack:
            machine = stack.enter_context(self.start("matmul", ("matmul", {})))
            running = {name: stack.enter_context(self.start(f"peak {name}", side)) for name, side in PEAK.items()}
            for side in running.values():
                side.steps(1)
            rounds = [
                {
                    "machine": machine.do("measure", tokens=tokens),
                    **{name: side.steps(self.args.steps) for name, side in running.items()},
                }
                for _ in range(self.args.rounds)
            ]
            return {"facts": {name: side.facts for name, side in running.items()}, "rounds": rounds}

    def gradients(self) -> dict[str, Any]:
        """Median over tensors of ‖g − g₀‖ / ‖g₀‖ at one seeded adapter with A and B like trained ones."""
        adapter, found, facts = self.work / "adapter.npz", {}, {}
        write_adapter(open_base(self.work / "model").linears, adapter)
        for name, side in GRADIENTS.items():
            with self.start(name, side) as running:
                found[name] = self.work / f"gradients {name}.npz"
                running.do("load", adapter=str(adapter))
                running.do("gradients", to=str(found[name]), batch=data.BATCH)
                facts[name] = running.facts
        return {"facts": facts, "errors": errors(found, OURS)}

    def learning(self) -> dict[str, Any]:
        """Held-out loss after the same steps over the same rows from the same adapter, for each seed of all three."""
        losses: dict[str, list[float]] = {name: [] for name in LEARNING}
        before, total, adapter = 0.0, self.args.learning_steps, self.work / "adapter.npz"
        for seed in range(self.args.seeds):
            write_adapter(open_base(self.work / "model").linears, adapter, spread=0.0, seed=seed)
            for name, side in LEARNING.items():
                with self.start(name, side, seed=seed, total=total) as running:
                    running.do("load", adapter=str(adapter))
                    before = before or running.do("held_out")["loss"]
                    running.steps(total)
                    losses[name].append(running.do("held_out")["loss"])
        return {"steps": total, "untrained": before, "losses": losses}

    def profile(self) -> dict[str, Any]:
        """Where a step of ours spends its time: what limits it where a target is missed."""
        found = {}
        for name, side in PROFILES.items():
            with self.start(f"profile {name}", side) as running:
                running.steps(1)
                found[name] = running.do("profile", batch=side[1].get("batch", data.BATCH))
        return {"ms": found}


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    other: dict[str, Callable[[Bench], dict[str, Any]]] = {
        "start": Bench.starts, "peak": Bench.peak, "gradients": Bench.gradients, "learning": Bench.learning,
        "profile": Bench.profile,
    }  # fmt: skip
    every = (*PARTS, *other)
    parser.add_argument("--rows", default=",".join(every), help="parts to measure: %(default)s")
    parser.add_argument("--base", type=Path, help="a GGUF of SmolLM2-135M; the quickstart's if it is not given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of each side in a round")
    parser.add_argument("--learning-steps", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--work", type=Path, help="a folder that keeps the checkpoint and the data between runs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    asked = [part for part in args.rows.split(",") if part]
    if unknown := set(asked) - set(every):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    result: dict[str, Any] = {"parts": {}}
    if args.out and args.out.exists():
        result = json.loads(args.out.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(args.work or Path(temporary) / "work", args.base, args) if asked else None
        for part in asked:
            assert bench is not None
            found = bench.steps(PARTS[part]) if part in PARTS else other[part](bench)
            result["parts"][part] = {
                "processor": processor_name(), "threads": args.threads, "data": bench.facts,
                "versions": {name: version(name) for name in PEERS}, **found,
            }  # fmt: skip
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    rows = table(result["parts"])
    print("| | target | found | |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row.what} | {row.target} | {row.found} | {row.verdict} |")
    return 0 if all(row.met is not False for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
