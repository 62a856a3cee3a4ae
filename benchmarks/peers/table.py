"""What was measured → the rows of the table: what, target, found, met or not. Imports nothing that measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

OURS = "edgelora"


@dataclass(frozen=True)
class Row:
    """`met` is None where there is no target."""

    what: str
    target: str
    found: str
    met: bool | None

    @property
    def verdict(self) -> str:
        return "" if self.met is None else "met" if self.met else "NOT MET"


@dataclass(frozen=True)
class Goal:
    """One of our sides against one peer: at least `speed` times its tokens/s, at most `memory` of its peak."""

    what: str
    part: str
    ours: str
    peer: str
    speed: float | None
    memory: float | None


GOALS = (
    Goal("TRL SFTTrainer at its defaults, ragged, bf16", "ragged-bf16", OURS, "trl", 6, 0.25),
    Goal("transformers + PEFT, ragged, bf16", "ragged-bf16", OURS, "stack", 3, 0.25),
    Goal("the same, ours in micro-batches of 512 tokens", "ragged-bf16", f"{OURS}, 512", "stack", None, None),
    Goal("the same, ours of 256, layers computed again", "ragged-bf16", f"{OURS}, least", "stack", None, None),
    Goal("TRL against the last", "ragged-bf16", f"{OURS}, least", "trl", None, None),
    Goal("transformers + PEFT, bf16, full rows of 512", "full-512", OURS, "stack", 2, 0.5),
    Goal("the same, full rows of 1024", "full-1024", OURS, "stack", 2, 0.5),
    Goal("transformers + PEFT, ragged, f32", "ragged-f32", OURS, "stack", 3.5, 0.25),
    Goal("the same with the oneDNN switch on", "ragged-f32", OURS, "stack, oneDNN", None, None),
    Goal("bitsandbytes NF4, ours over Q4_0", "4bit", f"{OURS}, q4_0", "stack", 4, 0.25),
    Goal("bitsandbytes NF4, ours over Q8_0", "4bit", f"{OURS}, q8_0", "stack", 4, 0.25),
    Goal("bitsandbytes NF4, ours over NF4", "4bit", f"{OURS}, nf4", "stack", 4, 0.25),
    Goal("bitsandbytes NF4, ours over Q4_K, 768 wide", "4bit-768", f"{OURS}, q4_k", "stack", 4, 0.25),
)
SHOWN = 10  # operators of a profile
START, SHARES, GRADIENT, LEARNING = 0.25, {"f32": 0.70, "bf16": 0.55}, 0.05, 0.005


def table(parts: Mapping[str, Any]) -> list[Row]:
    """The rows of every part that was measured."""
    rows = [
        row
        for goal in GOALS
        if goal.part in parts and goal.ours in parts[goal.part]["rounds"][0]
        for row in _against(goal, parts[goal.part])
    ]
    others: dict[str, Callable[[Mapping[str, Any]], list[Row]]] = {
        "start": _start, "peak": _peak, "gradients": _gradients, "learning": _learning,
        "profile": _profile,
    }  # fmt: skip
    return rows + [row for part, make in others.items() if part in parts for row in make(parts[part])]


def _against(goal: Goal, part: Mapping[str, Any]) -> list[Row]:
    def speed(side: str, taken: Mapping[str, Any]) -> float:
        return float(taken[side]["tokens"] / taken[side]["seconds"])

    rounds = part["rounds"]
    ours, peer = (median(speed(side, taken) for taken in rounds) for side in (goal.ours, goal.peer))
    ratio = median(speed(goal.ours, taken) / speed(goal.peer, taken) for taken in rounds)
    ours_mib, peer_mib = (rounds[-1][side]["peak_bytes"] / 2**20 for side in (goal.ours, goal.peer))
    share = ours_mib / peer_mib
    return [
        Row(
            f"{goal.what}: useful tokens/s", "" if goal.speed is None else f"≥ {goal.speed:g}×",
            f"{_shown(ratio, goal.speed)}× ({peer:.0f} → {ours:.0f})",
            None if goal.speed is None else ratio >= goal.speed,
        ),
        Row(
            f"{goal.what}: peak memory", "" if goal.memory is None else f"≤ {goal.memory:g}×",
            f"{_shown(share, goal.memory)}× ({peer_mib:.0f} → {ours_mib:.0f} MiB)",
            None if goal.memory is None else share <= goal.memory,
        ),
    ]  # fmt: skip


def _shown(found: float, target: float | None) -> str:
    """Two decimals, or three where two would show a figure on the target that misses it, or just meets it."""
    return f"{found:.3f}" if target is not None and round(found, 2) == target else f"{found:.2f}"


def _start(part: Mapping[str, Any]) -> list[Row]:
    ours, peer = (median(part["seconds"][side]) for side in (OURS, "trl"))
    found = f"{ours / peer:.2f}× ({peer:.1f} → {ours:.1f} s)"
    return [
        Row(
            "from command to first step, TRL",
            f"≤ {START:g}×",
            found,
            ours / peer <= START,
        )
    ]


def _peak(part: Mapping[str, Any]) -> list[Row]:
    rows = []
    for name, target in SHARES.items():
        found = [
            (taken[name]["flops"] / taken[name]["seconds"] / 1e9, taken["machine"][name]) for taken in part["rounds"]
        ]
        reached, best = median(step for step, _ in found), median(max(shapes.values()) for _, shapes in found)
        share = median(step / max(shapes.values()) for step, shapes in found)
        text = f"{share:.0%} ({reached:.0f} of {best:.0f} GFLOP/s)"
        rows.append(Row(f"share of the measured matmul peak, {name}", f"≥ {target:.0%}", text, share >= target))
    return rows


def _gradients(part: Mapping[str, Any]) -> list[Row]:
    rows = []
    for name, error in part["errors"].items():
        is_ours = name == f"{OURS} bf16"
        what = f"median error of gradients, {name}" + ("" if "against" in name else " against f32")
        text = f"{error:.2g}" if error < 1e-3 else f"{error:.1%}"
        rows.append(Row(what, f"≤ {GRADIENT:.0%}" if is_ours else "", text, error <= GRADIENT if is_ours else None))
    return rows


def _learning(part: Mapping[str, Any]) -> list[Row]:
    ours, peer = (sum(part["losses"][side]) / len(part["losses"][side]) for side in (OURS, "stack"))
    gap = ours / peer - 1
    what = f"held-out loss after {part['steps']} steps against transformers + PEFT, {len(part['losses'][OURS])} seeds"
    found = f"{gap:+.2%} ({peer:.4f} → {ours:.4f}; untrained {part['untrained']:.3f})"
    return [Row(what, f"within {LEARNING:.1%}", found, abs(gap) <= LEARNING)]


def _profile(part: Mapping[str, Any]) -> list[Row]:
    rows = []
    for name, ms in part["ms"].items():
        total = sum(ms.values())
        shares = [f"{operator.removeprefix('aten::')} {one / total:.0%}" for operator, one in list(ms.items())[:SHOWN]]
        rows.append(Row(f"where the time goes, {name}", "", f"{', '.join(shares)} of {total:.0f} ms", None))
    return rows
