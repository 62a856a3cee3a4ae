"""What a merge costs against the usual path: CPU seconds, peak memory and bytes left on the way, for the same file.

    .venv/bin/python benchmarks/export.py --tools BIN --llama-cpp SOURCE [--rounds 3] [--out FILE]

BIN has llama-export-lora and llama-quantize, SOURCE convert_lora_to_gguf.py and convert_hf_to_gguf.py: the tree of
llama.cpp inside llama-cpp-python's source package, built. Two ways to a Q4_K_M of one seeded adapter on all linears:

- over a GGUF base: convert_lora_to_gguf, llama-export-lora, llama-quantize;
- over a Hugging Face base: PEFT's merge, convert_hf_to_gguf, llama-quantize.

The sides take turns in every round, each step in a fresh process with one thread. CPU seconds are user + system of a
process and all its children, the peak is the largest process's. `edgelora merge` also holds its result against torch
in a child; the peers check nothing, so both its figures are shown and the work alone is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
QUANT, RANK = "Q4_K_M", 16
OURS, CHECKED, PEER = "edgelora", "edgelora, checked", "peer"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

# This process imports nothing of edgelora: the kernel counts a parent's memory at the fork in its child's peak.
DEFAULT_BASE = "from edgelora.pipeline.quickstart import default_base; print(default_base())"
PROCESSOR = "from edgelora.device import processor_name; print(processor_name())"
ADAPTER = """
import sys
from pathlib import Path
import numpy as np
from edgelora.base.model import open_base
from edgelora.files.contract import Contract
from edgelora.peft.adapter import Adapter, write_adapter
base, rank, draw = open_base(sys.argv[1]), int(sys.argv[3]), np.random.default_rng(0)
tensors = {
    name: {"lora_A": draw.normal(0, d_in**-0.5, (rank, d_in)).astype(np.float32),
           "lora_B": draw.normal(0, 0.01, (d_out, rank)).astype(np.float32)}
    for name, (d_out, d_in) in base.linears.items()
}
contract = Contract(
    version="benchmark", base=base.fingerprint, base_file=base.base_file, tokenizer_sha256=base.tokenizer.sha256,
    chat_template_sha256=base.template_sha256, eog_ids=base.tokenizer.eog_ids, method="lora",
)
settings = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2.0 * rank, "bias": "none",
    "base_model_name_or_path": sys.argv[1], "target_modules": sorted({n.rpartition(".")[2] for n in tensors}),
}
write_adapter(Path(sys.argv[2]), Adapter(settings, tensors, contract))
"""

WRITE = """
import sys
from pathlib import Path
from edgelora.pipeline.merge import MergeOptions, Wanted, open_parts, write_gguf
base, parts = open_parts(Path(sys.argv[1]), [(Path(sys.argv[2]), 1.0)], allow_unverified=False)
write_gguf(Path(sys.argv[3]), base, parts, Wanted.read(sys.argv[4], MergeOptions()))
"""

PEFT_MERGE = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
AutoTokenizer.from_pretrained(base).save_pretrained(out)
"""


@dataclass(frozen=True)
class Cost:
    """Of one side, all its steps together."""

    cpu_s: float
    peak_bytes: int
    between_bytes: int
    """Files that are neither what was given nor the result."""


@dataclass(frozen=True)
class Places:
    """Where everything lies."""

    room: Path
    gguf: Path
    checkpoint: Path
    adapters: dict[Path, Path]
    tools: Path
    llama_cpp: Path


def run(words: list[str | Path]) -> tuple[float, int]:
    """CPU seconds and the largest resident process of a command and its children. Raises SystemExit if it fails."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            list(map(str, words)), cwd=ROOT, stdout=log, stderr=log, env={**os.environ, **ONE_THREAD}
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            log.seek(0)
            raise SystemExit(f"{words[:3]}: exit code {process.returncode}\n{log.read().decode()[-2000:]}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def answer(code: str) -> str:
    """What a line of Python prints."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def measure(room: Path, steps: list[list[str | Path]], result: str) -> Cost:
    """Run the steps one after the other in `room`, a new folder."""
    room.mkdir()
    taken = [run(step) for step in steps]
    files = [file for file in room.rglob("*") if file.is_file() and file.name != result]
    return Cost(
        sum(cpu for cpu, _ in taken), max(peak for _, peak in taken), sum(file.stat().st_size for file in files)
    )


def gguf_peer(p: Places, room: Path) -> list[list[str | Path]]:
    lora, merged = room / "lora.gguf", room / "merged.gguf"
    convert = [sys.executable, p.llama_cpp / "convert_lora_to_gguf.py", p.adapters[p.gguf], "--base", p.checkpoint]
    return [
        [*convert, "--outfile", lora, "--outtype", "f16"],
        [p.tools / "llama-export-lora", "-m", p.gguf, "--lora", lora, "-o", merged, "-t", "1"],
        [p.tools / "llama-quantize", merged, room / "out.gguf", QUANT, "1"],
    ]


def hf_peer(p: Places, room: Path) -> list[list[str | Path]]:
    folder, half = room / "merged", room / "merged.gguf"
    convert = [sys.executable, p.llama_cpp / "convert_hf_to_gguf.py", folder, "--outfile", half, "--outtype", "bf16"]
    return [
        [sys.executable, "-c", PEFT_MERGE, p.checkpoint, p.adapters[p.checkpoint], folder],
        convert,
        [p.tools / "llama-quantize", half, room / "out.gguf", QUANT, "1"],
    ]


def written(p: Places, base: Path, room: Path) -> list[list[str | Path]]:
    return [[sys.executable, "-c", WRITE, base, p.adapters[base], room / "out.gguf", QUANT]]


def command(p: Places, base: Path, room: Path) -> list[list[str | Path]]:
    merge = [sys.executable, "-m", "edgelora", "merge", base, "--adapter", p.adapters[base], "--to", QUANT]
    return [[*merge, "--out", room / "out.gguf"]]


def compare(p: Places, rounds: int) -> dict[str, dict[str, list[Cost]]]:
    """The costs of each side of each part, a round after the other."""
    parts: dict[str, dict[str, Callable[[Path], list[list[str | Path]]]]] = {
        "GGUF base": {
            OURS: lambda room: written(p, p.gguf, room), CHECKED: lambda room: command(p, p.gguf, room),
            PEER: lambda room: gguf_peer(p, room),
        },
        "HF base": {
            OURS: lambda room: written(p, p.checkpoint, room), CHECKED: lambda room: command(p, p.checkpoint, room),
            PEER: lambda room: hf_peer(p, room),
        },
    }  # fmt: skip
    found: dict[str, dict[str, list[Cost]]] = {part: {side: [] for side in sides} for part, sides in parts.items()}
    for i in range(rounds):
        for part, sides in parts.items():
            for side, steps in sides.items():
                room = p.room / f"{part}-{side}-{i}".replace(" ", "-").replace(",", "")
                found[part][side].append(measure(room, steps(room), "out.gguf"))
                print(f"round {i + 1}, {part}, {side}: {found[part][side][-1]}", file=sys.stderr)
    return found


def prepared(room: Path, gguf: Path, tools: Path, llama_cpp: Path) -> Places:
    """Make the Hugging Face form of the base, and the adapter over each of the two."""
    checkpoint = room / "checkpoint"
    asked = json.dumps({"gguf": str(gguf), "folder": str(checkpoint), "width": None})
    run(["env", f"PYTHONPATH={ROOT / 'benchmarks'}", sys.executable, ROOT / "benchmarks/peers/checkpoint.py", asked])
    adapters = {gguf: room / "adapter", checkpoint: room / "adapter-hf"}
    for base, adapter in adapters.items():
        run([sys.executable, "-c", ADAPTER, base, adapter, str(RANK)])
    return Places(room, gguf, checkpoint, adapters, tools, llama_cpp)


def rows(found: dict[str, dict[str, list[Cost]]]) -> list[tuple[str, str, str, str]]:
    """(what, target, found, verdict) of each line of the table."""
    out = []
    for part, sides in found.items():
        cpu = {side: median(cost.cpu_s for cost in costs) for side, costs in sides.items()}
        peak = {side: max(cost.peak_bytes for cost in costs) / 2**20 for side, costs in sides.items()}
        speed = median(a.cpu_s / b.cpu_s for a, b in zip(sides[PEER], sides[OURS], strict=True))
        share, between = peak[OURS] / peak[PEER], sides[OURS][-1].between_bytes
        if part == "GGUF base":
            targets = ("≤ 5 CPU s", cpu[OURS] <= 5), ("≤ 250 MiB", peak[OURS] <= 250)
        else:
            targets = ("≥ 2×", speed >= 2), ("≤ 0.5×", share <= 0.5)
        (cpu_target, fast), (peak_target, small) = targets
        out += [
            (f"{part}: CPU seconds", cpu_target, f"{cpu[PEER]:.1f} → {cpu[OURS]:.1f} ({speed:.1f}×)", verdict(fast)),
            (f"{part}: peak, MiB", peak_target, f"{peak[PEER]:.0f} → {peak[OURS]:.0f} ({share:.2f}×)", verdict(small)),
            (f"{part}: files between, MB", "0", f"{sides[PEER][-1].between_bytes / 1e6:.0f} → {between / 1e6:.0f}",
             verdict(between == 0)),
            (f"{part}: the command with its check", "", f"{cpu[CHECKED]:.1f} CPU s, {peak[CHECKED]:.0f} MiB", ""),
        ]  # fmt: skip
    return out


def verdict(met: bool) -> str:
    return "met" if met else "NOT MET"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tools", type=Path, required=True)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--base", type=Path, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "export.json")
    asked = parser.parse_args()
    gguf = (asked.base or Path(answer(DEFAULT_BASE))).resolve()
    with tempfile.TemporaryDirectory(prefix="edgelora-export-") as room:
        places = prepared(Path(room), gguf, asked.tools.resolve(), asked.llama_cpp.resolve())
        found = compare(places, asked.rounds)
    table = rows(found)
    print("| what | target | peer → edgelora | |\n|---|---|---|---|")
    for line in table:
        print(f"| {' | '.join(line)} |")
    asked.out.write_text(json.dumps({
        "processor": answer(PROCESSOR), "base": gguf.name, "quant": QUANT, "rank": RANK,
        "table": table, "costs": {part: {side: list(map(asdict, costs)) for side, costs in sides.items()}
                                  for part, sides in found.items()},
    }, indent=2) + "\n", encoding="utf-8")  # fmt: skip
    return 0 if all(line[3] != "NOT MET" for line in table) else 1


if __name__ == "__main__":
    sys.exit(main())
