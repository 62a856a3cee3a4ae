"""One adapter for all sides to begin with, and how far gradients of two number formats are apart. numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from peers.data import RANK

SPREAD = 0.01  # of B: what AdamW at 1e-3 makes of it in about ten steps; at B = 0 the gradient of A would be 0


def write_adapter(linears: Mapping[str, tuple[int, int]], path: Path, spread: float = SPREAD, seed: int = 0) -> None:
    """A seeded LoRA for every linear layer (d_out, d_in): A as it is drawn at the start, B normal about 0."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, (d_out, d_in) in linears.items():
        tensors[f"{name}.lora_A"] = random.uniform(-(d_in**-0.5), d_in**-0.5, (RANK, d_in)).astype(np.float32)
        tensors[f"{name}.lora_B"] = random.normal(0, spread, (d_out, RANK)).astype(np.float32)
    np.savez(path, **tensors)  # type: ignore[arg-type]


def errors(found: Mapping[str, Path], ours: str) -> dict[str, float]:
    """Median over tensors of ‖g − g₀‖ / ‖g₀‖: each side against its own float32, and the two float32 to each other."""
    pairs = {
        f"{ours} bf16": (f"{ours} bf16", f"{ours} f32"),
        "stack bf16": ("stack bf16", "stack f32"),
        "stack autocast": ("stack autocast", "stack f32"),
        f"{ours} f32 against stack f32": (f"{ours} f32", "stack f32"),
    }
    return {name: _median_error(found[one], found[other]) for name, (one, other) in pairs.items()}


def _median_error(path: Path, exact: Path) -> float:
    with np.load(path) as found, np.load(exact) as expected:
        assert set(found.files) == set(expected.files)
        return float(np.median([
            np.linalg.norm(found[name] - expected[name]) / np.linalg.norm(expected[name]) for name in expected.files
        ]))  # fmt: skip
