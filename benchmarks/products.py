"""Sums of matrix products (edgelora/nn/products.py) against torch's: those of SmolLM2-135M with a LoRA of rank 16.

    .venv/bin/python benchmarks/products.py [--tokens 542] [--rounds 15] [--out benchmarks/results/products.json]

In turns, medians. Each product has other weights than the one before it, as in a step: they come from memory. torch's
float32 products are those that `edgelora train` chooses on this processor.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from edgelora.device import choose_products, physical_cores, processor_name
from edgelora.nn.products import Sum, compute

SHAPES = ((576, 576), (576, 192), (576, 1536), (1536, 576))  # d_in, d_out of its layers
RANK = 16
WEIGHTS = 40  # that take turns: more than a cache holds of the large ones
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def products(tokens: int, d_in: int, d_out: int, dtype: torch.dtype) -> dict[str, dict[str, Callable[[], object]]]:
    """What is computed → who computes it → a call."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    weights = [draw(d_out, d_in) for _ in range(WEIGHTS)]
    x, dy, down, a, b = draw(tokens, d_in), draw(tokens, d_out), draw(tokens, RANK), draw(RANK, d_in), draw(d_out, RANK)
    y, dx, of_b = torch.empty_like(dy), torch.empty_like(x), torch.empty(d_out, RANK)
    ours, theirs = cycle(weights), cycle(weights)

    def add_torchs() -> None:
        torch.mm(x, next(theirs).T, out=y).addmm_(down, b.T)

    return {
        "x Wᵀ": {
            "ours": lambda: compute(Sum(y, [(x, next(ours).T)])),
            "torch": lambda: torch.mm(x, next(theirs).T, out=y),
        },
        "x Wᵀ + z Bᵀ": {
            "ours": lambda: compute(Sum(y, [(x, next(ours).T), (down, b.T)])),
            "torch": add_torchs,
        },
        "dy W": {
            "ours": lambda: compute(Sum(dx, [(dy, next(ours))])),
            "torch": lambda: torch.mm(dy, next(theirs), out=dx),
        },
        "x Aᵀ": {
            "ours": lambda: compute(Sum(down, [(x, a.T)])),
            "torch": lambda: torch.mm(x, a.T, out=down),
        },
        "dyᵀ z, float32": {
            "ours": lambda: compute(Sum(of_b, [(dy.T, down)])),
            "torch": lambda: (down.T @ dy).T.to(torch.float32).contiguous(),
        },
    }


def measure(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, in turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):  # the first makes code and buffers
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    return {name: median(seconds[1:]) for name, seconds in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--tokens", type=int, default=542)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(physical_cores())
    torch.set_float32_matmul_precision(choose_products().value)
    torch.manual_seed(0)
    found: list[dict[str, Any]] = []
    for name, dtype in DTYPES.items():
        for d_in, d_out in SHAPES:
            for what, calls in products(args.tokens, d_in, d_out, dtype).items():
                seconds = measure(calls, args.rounds)
                row = {"dtype": name, "d_in": d_in, "d_out": d_out, "what": what}
                found.append({**row, **{f"{who}_us": round(s * 1e6) for who, s in seconds.items()}})
                print(found[-1], f"{seconds['torch'] / seconds['ours']:.2f}", flush=True)
    if args.out:
        result = {"processor": processor_name(), "cores": physical_cores(), "tokens": args.tokens, "found": found}
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
