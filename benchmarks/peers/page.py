"""The part of docs/performance.md about a training step: its table, and what limits a step, in words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peers.limits import MIB, PRODUCTS, floors, products, twice
from peers.table import table

RESULTS = Path(__file__).resolve().parent.parent / "results"

TRAINING = """## A training step against what people use

    python benchmarks/train.py --rounds {rounds} --out benchmarks/results/train.json

SmolLM2-135M, LoRA of rank 16 on all linear layers, ragged chats of 50 to 500 tokens, four rows a step,
{threads} threads of {processor} (losses: {learning_threads}), medians of {rounds} rounds; peak memory is the whole
process.
"""

LIMITS = """
What limits a step: its matrix products. They take the shares of time below, and reach, with attention's operations and
time left out, {products}.
They do not reach more because each micro-batch brings all weights from memory twice, and because an adapter's products
are only 16 wide. The rest lies between products, where each layer's tensors are read and written a few times, over
quantized weights in their way out of the blocks, and in Python and autograd (looked at once: 0.09 s a micro-batch).
Products are summed in float32 by code of our own (the next section); attention and logits multiply in bfloat16 and sum
in float32.

The processor is a Zen 4. The record before, without these products, was of a Zen 5, whose products are twice as fast:
TRL 6.22 times, PEFT 3.28 (ragged), 1.99 and 2.11 (full rows), 3.73 (float32), bitsandbytes 4.0 to 4.4. The machine
shares its memory with others, which slows the sides unequally: of three records on it, hours apart, TRL was 5.1 to 7.0
times slower, PEFT 3.3 to 3.8 (ragged; 0.23 to 0.26 of its memory), 1.7 to 1.8 and 1.7 to 1.9 (full rows), 2.3 to 2.9
(float32), bitsandbytes 3.9 to 4.8 (Q4_0). On one Zen 4, in turns with the tree before these products (9edfc9d;
`benchmarks/turns.py`, medians of 5 rounds), a step is 1.17 times as fast (ragged bfloat16), 1.19 (float32), 1.24
(Q4_0), 1.08 (full rows of 512 and 1024), and takes 50 to 84 MiB less.

Full rows have no padding, so what packing gains over ragged ones (a factor of {padding:.2f}) is gone. Twice the peer's
speed would be {wanted_512:.0f} tokens/s at 512 ({needed_512:.0%} of the peak, where {reached_512:.0%} are reached) and
{wanted_1024:.0f} at 1024 ({needed_1024:.0%}, where {reached_1024:.0%} are). There attention takes {attention:.0%} of
the time.

The way to the first step is mostly imports: torch's take 0.66 s, the command line and our own modules 0.3, the rows and
their tokenizer 0.3 (looked at once, on the Zen 5). The row is `edgelora train` as one types it, from the start of
its process, against a script with TRL's trainer in it.

Memory is bought with time: micro-batches of 512 tokens instead of 768 (`--micro-batch-tokens`), or of 256 with each
layer computed again (`--recompute full`), are the rows below those at the defaults.

`torch.compile` is not used: importing it alone costs 885 modules, 150 MB and 0.9 s (`edgelora/training/optim.py`).
"""

FLOORS = """
What no step can do without, where a target of memory is missed, MiB: the process before any weight is read, the weights
(the embedding in bfloat16), and the adapter with its gradients and AdamW's moments. Logits take {logits:.0f} more, and
the activations of {tokens:,} tokens in bfloat16 {activations:.0f}. Where less than nothing is left, the target cannot
be met at this size whatever is done with activations; `--recompute full` keeps fewer of these.
"""

GROUPS = {
    "products": PRODUCTS,
    "attention": ("SegmentAttention", "SegmentAttentionBackward"),
    "softmax of the loss": ("LinearCrossEntropy",),
    "norms, gates, rotation": (
        "SwiGLU", "SwiGLUBackward", "RMSNorm", "RMSNormBackward", "Rotary", "RotaryBackward",
    ),
    "weights out of their storage": ("LoraLinears", "LoraLinearsBackward", "FrozenLinear", "FrozenLinearBackward"),
    "copies and sums": ("aten::copy_", "aten::add", "aten::add_", "aten::mul", "aten::mul_", "aten::cat"),
}  # fmt: skip


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def training(result: Mapping[str, Any]) -> str:
    parts = result["parts"]
    any_part = parts["ragged-bf16"]
    rows = table({name: part for name, part in parts.items() if name != "profile"})
    text = TRAINING.format(
        threads=any_part["threads"], processor=any_part["processor"], rounds=len(any_part["rounds"]),
        learning_threads=parts["learning"]["threads"],
    )  # fmt: skip
    text += "\n" + markdown(["", "target", "found", ""], [(r.what, r.target, r.found, r.verdict) for r in rows]) + "\n"
    return text + limits(parts) + "\n" + profile(parts["profile"]["ms"]) + floor(parts)


def limits(parts: Mapping[str, Any]) -> str:
    """Why a step is no faster, with the shares that were recorded."""
    reached = "; ".join(f"{share:.0%} of the peak ({name})" for name, share in products(parts).items())
    figures: dict[str, float] = {}
    for size in (512, 1024):
        found = twice(parts, f"full-{size}")
        figures |= dict(zip((f"wanted_{size}", f"needed_{size}", f"reached_{size}"), found, strict=True))
    ms = parts["profile"]["ms"]["full rows of 1024, bf16"]
    attention = sum(ms[operator] for operator in GROUPS["attention"]) / sum(ms.values())
    padding = parts["full-1024"]["data"]["padding_factor"]
    return LIMITS.format(products=reached, padding=padding, attention=attention, **figures)


def floor(parts: Mapping[str, Any]) -> str:
    """The memory that every step takes, against the targets that are missed."""
    step, memory = (json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in ("step", "memory"))
    found = floors(parts, step, memory)
    case = next(c for c in memory["cases"] if (c["dtype"], c["micro_batch_tokens"]) == ("bf16", 1024))
    logits, activations = (case["parts"][name] / MIB for name in ("logits", "activations"))
    head = ["", "target", "process", "weights", "adapter and AdamW", "in all", "left of the target"]
    rows = [(what, *(f"{n:.0f}" for n in (target, *needed, sum(needed), target - sum(needed))))
            for what, target, *needed in found]  # fmt: skip
    about = FLOORS.format(logits=logits, activations=activations, tokens=case["tokens"])
    return about + "\n" + markdown(head, rows) + "\n"


def profile(found: Mapping[str, Mapping[str, float]]) -> str:
    """Shares of a step's milliseconds; a profiler makes small operators dearer than they are."""
    named = {operator for operators in GROUPS.values() for operator in operators}
    rows = []
    for name, ms in found.items():
        total = sum(ms.values())
        shares = [sum(ms.get(operator, 0.0) for operator in operators) / total for operators in GROUPS.values()]
        rest = sum(one for operator, one in ms.items() if operator not in named) / total
        rows.append([name, *(f"{share:.0%}" for share in (*shares, rest)), f"{total:.0f}"])
    return markdown(["share of a step", *GROUPS, "the rest", "ms"], rows) + "\n"
