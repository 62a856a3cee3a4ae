"""The memory plan against what a training process really took: its peak resident memory, over several configurations.

    .venv/bin/python benchmarks/memory.py [--base FILE] [--out benchmarks/results/memory.json]

Each configuration is a process of its own that does two steps over ragged rows (log-normal, as `peers/data.py`), or
over some of one length. Memory is measured, not time: two run at once, and the machine may be busy meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgelora.config import TrainConfig
from edgelora.data.encode import Example
from edgelora.device import choose_products, compute_threads, computing, peak_memory_bytes

ROOT = Path(__file__).resolve().parent.parent
AT_ONCE, STEPS, ROWS, SHORTEST, LONGEST, MEDIAN, SIGMA = 2, 2, 16, 50, 500, 158, 0.5
WITHIN = 0.1


class Case(NamedTuple):
    base_dtype: str
    dtype: str
    recompute: str
    micro_batch_tokens: int
    rank: int
    method: str = "lora"
    row_tokens: int | None = None
    """Of each row; None: ragged ones."""
    compiled: bool = True
    """Whether the compiled code computes, or torch in its place."""


CASES = (
    Case("blocks", "bf16", "off", 256, 16),
    Case("blocks", "bf16", "off", 512, 16),
    Case("blocks", "bf16", "off", 1024, 16),
    Case("blocks", "bf16", "off", 2048, 16, row_tokens=2048),
    Case("blocks", "bf16", "full", 768, 16),
    Case("blocks", "f32", "off", 512, 16),
    Case("blocks", "f32", "off", 768, 16),
    Case("blocks", "f32", "off", 1500, 16, row_tokens=1500),
    Case("nf4", "f32", "full", 768, 16),
    Case("f32", "f32", "full", 1536, 16),
    Case("bf16", "bf16", "off", 768, 8),
    Case("bf16", "bf16", "full", 256, 64),
    Case("nf4", "bf16", "off", 256, 64),
    Case("blocks", "bf16", "off", 768, 16, "dora"),
    Case("blocks", "bf16", "off", 768, 16, compiled=False),
    Case("blocks", "f32", "off", 512, 16, compiled=False),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--base", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "memory.json")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child is not None:
        print(json.dumps(_measure(asked.base, CASES[asked.child])))
        return
    found: list[dict[str, Any]] = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for row in pool.map(partial(_run, asked.base), range(len(CASES))):
            found.append(row)
            asked.out.write_text(
                json.dumps({"base": asked.base.name, "cases": found}, indent=1) + "\n", encoding="utf-8"
            )
    print(table(found))


def _run(base: Path, number: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--base", str(base), "--child", str(number)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**CASES[number]._asdict(), **row, "error": row["planned"] / row["measured"] - 1}


def table(found: list[dict[str, Any]]) -> str:
    """The result as Markdown."""
    lines = [
        "| base held as | products | by | recompute | micro-batch | rows | r | method | plan | measured, MB | error |",
        "|---|---|---|---|---:|---:|---:|---|---:|---:|---:|",
    ]
    for row in found:
        by = "compiled code" if row["compiled"] else "torch"
        lines.append(
            f"| {row['base_dtype']} | {row['dtype']} | {by} | {row['recompute']} | {row['micro_batch_tokens']} "
            f"| {row['row_tokens'] or 'ragged'} | {row['rank']} | {row['method']} | {row['planned'] / 1e6:.0f} "
            f"| {row['measured'] / 1e6:.0f} | {row['error']:+.1%} |"
        )
    return "\n".join(lines)


def rows(vocabulary: int, tokens: int | None) -> list[Example]:
    draw = np.random.default_rng(0)
    ragged = draw.lognormal(np.log(MEDIAN), SIGMA, ROWS).clip(SHORTEST, LONGEST).astype(int)
    lengths = ragged if tokens is None else [tokens] * 2
    return [Example(draw.integers(3, vocabulary, n), np.arange(n) > n // 3) for n in lengths]


def _measure(path: Path, case: Case) -> dict[str, Any]:
    """In the child: plan, then train, as a run does."""
    import torch

    from edgelora.base.decoder import build_decoder
    from edgelora.base.model import open_base
    from edgelora.kernels import load as kernels
    from edgelora.peft.inject import inject
    from edgelora.training.base_footprint import Model
    from edgelora.training.footprint import Load, footprint
    from edgelora.training.memory import resident_bytes
    from edgelora.training.objectives import objective_of
    from edgelora.training.objectives.objective import mean_losses
    from edgelora.training.optim import build_optimizer

    if not case.compiled:
        kernels.library = lambda: None  # type: ignore[assignment]  # as where there was no compiler
    settings = {name: value for name, value in case._asdict().items() if name in TrainConfig.model_fields}
    config = TrainConfig(base=path, data=path, out=path, alpha=32.0, learning_rate=1e-3, **settings)
    base = open_base(path)
    base.tokenizer.encode("a run encodes its rows")
    base.template  # noqa: B018  (opened once, as a run does)
    examples, objective = rows(base.config.vocab_size, case.row_tokens), objective_of(config)
    packed = objective.pack(examples, case.micro_batch_tokens)
    load = Load(max(len(b.input_ids) for b in packed), max(map(len, examples)), case.recompute == "full")
    parts = footprint(Model.of(base), config, load, "cpu", resident_bytes())
    decoder = build_decoder(base, case.base_dtype, {"f32": torch.float32, "bf16": torch.bfloat16}[case.dtype])
    decoder.recompute = load.recompute
    inject(decoder, case.method, case.rank, 32.0, 0)
    optimizer = build_optimizer(decoder.named_parameters(), config)
    with computing(choose_products(), compute_threads()):
        for _ in range(STEPS):
            for scored in mean_losses(objective, decoder, packed, config):
                torch.autograd.backward(scored.loss)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return {"planned": parts.total, "measured": peak_memory_bytes(), "tokens": load.tokens, "parts": parts.as_dict()}


if __name__ == "__main__":
    main()
