"""How fast weights become float32: ggml's kernels and torch code against gguf-py, NF4 against bitsandbytes' CPU code.

    .venv/bin/python benchmarks/dequantize.py [--rows 2048] [--rounds 9] [--out benchmarks/results/dequantize.json]

Each row is measured interleaved and compares medians, so that a busy machine slows both sides alike. bitsandbytes is
called as its own linear layer calls it: `dequantize_4bit` with a nested state, into memory that it allocates.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import gguf
import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as Type

from edgelora.base import ggml
from edgelora.base.nf4 import quantize_nf4
from edgelora.base.torch_blocks import DEQUANTIZE, dequantize_blocks
from edgelora.base.weights import GGUFBlocks
from edgelora.device import physical_cores, processor_name

COLUMNS = 2048
AT_LEAST = dict.fromkeys(ggml.DEQUANTIZE, 4.0) | {Type.Q4_K: 15.0, Type.Q8_0: 15.0}  # times gguf-py
NF4_AT_LEAST = 0.5  # times bitsandbytes
WARM_CALLS = 5


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each call, one after the other in every round.

    A turn is a few calls, and the last is timed: a training step calls hundreds of times in a row, with its threads
    awake and its buffer in the cache, and so does each of the two here.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            for _ in range(WARM_CALLS):
                call()
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    return {name: median(seconds) for name, seconds in taken.items()}


def blocks_of(kind: Type, rows: int) -> np.ndarray:
    """Real blocks: 16 rows of normal weights, quantized and repeated, for some types take seconds to quantize."""
    weights = np.random.default_rng(0).normal(0, 0.05, (16, COLUMNS)).astype(np.float32)
    return np.tile(ggml.quantize(weights, kind, np.ones(COLUMNS, np.float32)), (rows // 16, 1))


def measure_blocks(kind: Type, rows: int, rounds: int) -> dict[str, float]:
    """Seconds of ggml's kernel (`ours`), of torch code (`torch`) and of gguf-py (`peer`), where each has the type."""
    blocks = blocks_of(kind, rows)
    weight, on_device = GGUFBlocks(blocks, kind, COLUMNS), torch.from_numpy(blocks)
    calls: dict[str, Callable[[], object]] = {"ours": weight.dequantize}
    if kind in DEQUANTIZE:
        calls["torch"] = lambda: dequantize_blocks(on_device, kind, COLUMNS)
    if kind != Type.Q1_0:  # gguf-py has no code for it
        calls["peer"] = lambda: gguf.quants.dequantize(blocks, kind)
    return medians(calls, rounds)


def measure_nf4(rows: int, rounds: int) -> dict[str, float]:
    from bitsandbytes import functional as bnb

    weight = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(0))
    ours = quantize_nf4(weight)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    return medians({"ours": ours.dequantize, "peer": lambda: bnb.dequantize_4bit(codes, state)}, rounds)


def row(name: str, seconds: dict[str, float], size_bytes: int, at_least: float) -> dict[str, object]:
    rates = {f"{who}_gb_per_s": round(size_bytes / s / 1e9, 2) for who, s in seconds.items()}
    ratio = round(seconds["peer"] / seconds["ours"], 2) if "peer" in seconds else None
    return {"type": name, **rates, "ratio": ratio, "at_least": at_least, "met": ratio is None or ratio >= at_least}


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048, help=f"rows of {COLUMNS} weights, a multiple of 16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--types", nargs="*", default=[*(kind.name for kind in ggml.DEQUANTIZE), "NF4"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(physical_cores())
    size_bytes = args.rows * COLUMNS * 4
    print(f"{processor_name()}, {physical_cores()} cores; GB of float32 written per second, {args.rows} x {COLUMNS}\n")
    print("| type | edgelora | torch code | peer | times the peer | target | |\n|---|---:|---:|---:|---:|---:|---|")
    rows = []
    for name in args.types:
        if name == "NF4":
            found = row(name, measure_nf4(args.rows, args.rounds), size_bytes, NF4_AT_LEAST)
        else:
            kind = Type[name]
            found = row(name, measure_blocks(kind, args.rows, args.rounds), size_bytes, AT_LEAST[kind])
        rows.append(found)
        cells = [found.get(key) for key in ("ours_gb_per_s", "torch_gb_per_s", "peer_gb_per_s", "ratio")]
        line = " | ".join("–" if cell is None else f"{cell}" for cell in cells)
        print(f"| {name} | {line} | ≥ {found['at_least']:g} | {'met' if found['met'] else 'NOT MET'} |", flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"processor": processor_name(), "cores": physical_cores(), "rows": args.rows, "found": rows}
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if all(found["met"] for found in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
