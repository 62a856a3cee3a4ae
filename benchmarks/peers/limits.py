"""What limits a training step: shares of the machine's peak, and memory that no step can do without, as recorded."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from peers.table import GOALS, Goal

MIB = 2**20
HEADS_WIDTH, LAYERS, VOCABULARY = 576, 30, 49152  # of SmolLM2-135M; the padded one has the same heads
WIDTHS = {"4bit-768": 768}  # of parts whose model is padded
HELD = {"blocks": "bf16"}  # of the checkpoint that all sides train over: its blocks are bfloat16
ADAMW_BYTES = 16  # of each trained parameter in float32: itself, its gradient and two moments
PROFILED = {"ragged, bf16": "ragged-bf16", "ragged, f32": "ragged-f32", "full rows of 1024, bf16": "full-1024"}
PRODUCTS = ("aten::mm", "aten::addmm_", "aten::addmm", "aten::bmm", "aten::matmul", "sums of products")


def peak_gflops(parts: Mapping[str, Any], dtype: str) -> float:
    """What the best product of the machine reached."""
    return float(median(max(taken["machine"][dtype].values()) for taken in parts["peak"]["rounds"]))


def step_gflops(parts: Mapping[str, Any], name: str) -> float:
    """What a step reached: of ragged rows in the turns with the machine's own products."""
    dtype = name.rpartition("-")[2]
    rounds, side = (
        (parts["peak"]["rounds"], dtype) if name.startswith("ragged") else (parts[name]["rounds"], "edgelora")
    )
    return float(median(taken[side]["flops"] / taken[side]["seconds"] / 1e9 for taken in rounds))


def products(parts: Mapping[str, Any]) -> dict[str, float]:
    """Of each profile: the share of the peak that matrix products reach, attention's operations and time left out."""
    found = {}
    for profile, name in PROFILED.items():
        part, ms = parts[name], parts["profile"]["ms"][profile]
        sizes = [taken["edgelora"] for taken in part["rounds"]]
        row_tokens = part["data"]["mean_tokens"] if name.startswith("ragged") else int(name.rpartition("-")[2])
        attention = 12 * (row_tokens + 1) / 2 * HEADS_WIDTH * LAYERS  # operations a token, as `ours` counts them
        others = 1 - attention / median(size["flops"] / size["tokens"] for size in sizes)
        time = sum(ms.get(operator, 0.0) for operator in PRODUCTS) / sum(ms.values())
        dtype = "f32" if name.endswith("f32") else "bf16"
        found[profile] = step_gflops(parts, name) / peak_gflops(parts, dtype) * others / time
    return found


def twice(parts: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    """Full rows: tokens/s that are twice the peer's, the share of the peak they take, and the share that is reached."""
    taken = parts[name]["rounds"]
    wanted = 2 * median(one["stack"]["tokens"] / one["stack"]["seconds"] for one in taken)
    flops = median(one["edgelora"]["flops"] / one["edgelora"]["tokens"] for one in taken)
    peak = peak_gflops(parts, "bf16")
    return wanted, wanted * flops / 1e9 / peak, step_gflops(parts, name) / peak


def floors(
    parts: Mapping[str, Any], step: Mapping[str, Any], memory: Mapping[str, Any]
) -> list[tuple[str, float, float, float, float]]:
    """Of each row whose peak misses its target, in MiB: the target, the process, the weights, what is trained.

    The process is what it takes before any weight; weights are the layers' as `step` recorded them and the embedding.
    """
    process = min(case["parts"]["process"] for case in memory["cases"]) / MIB
    layers = {(one["width"], one["held"]): one["mb"] * 1e6 for one in step["found"]}
    found = []
    for goal in GOALS:
        part = parts.get(goal.part)
        if part is None or goal.memory is None or not _missed(goal, part):
            continue
        width, held = WIDTHS.get(goal.part, HEADS_WIDTH), part["facts"][goal.ours]["held"]
        weights = (layers[width, HELD.get(held, held)] + 2 * VOCABULARY * width) / MIB
        trained = ADAMW_BYTES * part["facts"]["stack"]["parameters"] / MIB
        target = goal.memory * part["rounds"][-1][goal.peer]["peak_bytes"] / MIB
        found.append((goal.what, target, process, weights, trained))
    return found


def _missed(goal: Goal, part: Mapping[str, Any]) -> bool:
    ours, peer = (part["rounds"][-1][side]["peak_bytes"] for side in (goal.ours, goal.peer))
    return goal.memory is not None and bool(ours > goal.memory * peer)
