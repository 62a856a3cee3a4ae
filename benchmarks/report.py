"""What the text of a report costs against llama-perplexity over the same files and windows, process by process.

    python benchmarks/report.py --base F16.gguf --text wiki.txt --tools BIN --room FOLDER [--chunks 3] [--rounds 2]
        [--prepare] [--out FILE]

BIN has llama-perplexity, built from the tree of llama.cpp that llama-cpp-python is built from, for the same processor.
`--prepare` writes the levels and both sides' references into FOLDER and measures nothing. Three sides take turns, each
in a process of its own with as many threads as there are cores: a report's cell (perplexity, bits per byte, KL and same
top against the reference's likeliest tokens), llama-perplexity with the same against its own reference, and
llama-perplexity for perplexity alone. Wall time, so the machine must be quiet.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from edgelora.device import physical_cores, processor_name
from edgelora.pipeline.grid import LEVELS
from edgelora.pipeline.perplexity import Run, measure
from edgelora.pipeline.quantize import quantize

ROOT = Path(__file__).resolve().parent.parent
OURS, THEIRS, PLAIN = "edgelora", "llama-perplexity, KL", "llama-perplexity"
TARGET = 1.2  # times llama-perplexity's own time
CONTEXT = 512


@dataclass(frozen=True)
class Places:
    base: Path
    text: Path
    tools: Path
    room: Path
    chunks: int

    def level(self, quant: str) -> Path:
        return self.base if quant == "F16" else self.room / f"{quant}.gguf"

    @property
    def our_reference(self) -> Path:
        return self.room / "likeliest.ref"

    @property
    def their_reference(self) -> Path:
        return self.room / "all.kld"

    def ours(self, quant: str) -> None:
        measure(Run(self.level(quant), self.text, against=self.our_reference, chunks=self.chunks))

    def theirs(self, quant: str, *words: str) -> None:
        command = [self.tools / "llama-perplexity", "-m", self.level(quant), "-f", self.text, "-c", str(CONTEXT),
                   "--chunks", str(self.chunks), "-t", str(physical_cores()), *words]  # fmt: skip
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"llama-perplexity failed: {done.stderr[-500:]}")

    def with_kl(self, quant: str) -> None:
        self.theirs(quant, "--kl-divergence-base", str(self.their_reference), "--kl-divergence")

    def prepare(self) -> None:
        """Whatever is missing: the levels, and what the F16 says of the text, as each side keeps it."""
        self.room.mkdir(parents=True, exist_ok=True)
        for quant in LEVELS:
            if not self.level(quant).exists():
                quantize(self.base, self.level(quant), quant)
        measure(Run(self.base, self.text, save=self.our_reference, chunks=self.chunks))
        self.theirs("F16", "--kl-divergence-base", str(self.their_reference))


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def turns(places: Places, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each side at each level, a round after the other."""
    sides: dict[str, Callable[[str], None]] = {OURS: places.ours, THEIRS: places.with_kl, PLAIN: places.theirs}
    found: dict[str, dict[str, list[float]]] = {side: {quant: [] for quant in LEVELS} for side in sides}
    for i in range(rounds):
        for quant in LEVELS:
            for side in list(sides)[:: 1 if i % 2 == 0 else -1]:
                found[side][quant].append(seconds(lambda side=side, quant=quant: sides[side](quant)))  # type: ignore[misc]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in ("base", "text", "room"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--tools", type=Path, default=Path(os.environ.get("EDGELORA_LLAMA_TOOLS", ".")))
    parser.add_argument("--chunks", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "report.json")
    asked = parser.parse_args()
    places = Places(asked.base.resolve(), asked.text.resolve(), asked.tools.resolve(), asked.room, asked.chunks)
    if asked.prepare:
        places.prepare()
        return 0
    found = turns(places, asked.rounds)
    levels = {side: {quant: median(took) for quant, took in by_level.items()} for side, by_level in found.items()}
    whole = {side: sum(by_level.values()) for side, by_level in levels.items()}
    print("| level | " + " | ".join(levels) + " |\n|---|" + "---:|" * len(levels))
    for quant in LEVELS:
        print(f"| {quant} | " + " | ".join(f"{levels[side][quant]:.2f} s" for side in levels) + " |")
    print(f"all levels: {whole[OURS] / whole[THEIRS]:.2f} times, {whole[OURS] / whole[PLAIN]:.2f} times without KL")
    asked.out.write_text(json.dumps({
        "processor": processor_name(), "threads": physical_cores(), "base": places.base.name, "chunks": places.chunks,
        "context": CONTEXT, "rounds": asked.rounds, "levels": levels, "whole": whole,
        "over_with_kl": whole[OURS] / whole[THEIRS], "over_plain": whole[OURS] / whole[PLAIN], "target": TARGET,
        "seconds": found,
    }, indent=2) + "\n", encoding="utf-8")  # fmt: skip
    return 0 if whole[OURS] <= TARGET * whole[THEIRS] else 1


if __name__ == "__main__":
    sys.exit(main())
