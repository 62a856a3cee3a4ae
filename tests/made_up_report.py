"""A report whose figures are made up by a formula and a seed: for tests of the page, never for a claim."""

from __future__ import annotations

import math

import numpy as np

from edgelora.evaluate.cells import CellResult, Measure, Provenance, Report, Sample, UsedFile
from edgelora.evaluate.protocols import Speed

LEVELS = {"Q2_K": (88, 0.30), "Q3_K_M": (96, 0.10), "Q4_K_M": (105, 0.03), "Q8_0": (145, 0.004), "F16": (271, 0.0)}
N_ROWS, N_WINDOWS, TOKENS = 120, 16, 255
NASTY = '<script>alert("x")</script> | `code` **bold** ](javascript:1) {{ 7*7 }} \x1b[31m\u202e &amp; ```\n# heading'


def share(right: np.ndarray) -> Measure:
    mean, half = float(right.mean()), 1.96 * math.sqrt(right.mean() * (1 - right.mean()) / len(right))
    return Measure(mean, (mean - half, mean + half), tuple(right.astype(float).tolist()))


def per_token(means: np.ndarray, tokens: int, *, exponent: bool = False) -> Measure:
    mean, half = float(means.mean()), 1.96 * float(means.std()) / math.sqrt(len(means))
    finish = math.exp if exponent else float
    rows, weights = tuple((means * tokens).tolist()), (float(tokens),) * len(means)
    return Measure(finish(mean), (finish(mean - half), finish(mean + half)), rows, weights)


def made_up_cell(way: str, quant: str) -> CellResult:
    megabytes, damage = LEVELS[quant]
    rows, windows = np.random.default_rng(0), np.random.default_rng(1)  # the same rows in every cell
    skill = 0.05 if way == "base" else 0.95
    hardness, noise = rows.random(N_ROWS), rows.normal(1, 0.2, N_ROWS)
    text = windows.normal(3.0, 0.2, N_WINDOWS)
    measures = {
        "right": share(hardness < skill - damage),
        "right/known": share(hardness[:60] < skill - damage / 2),
        "loss": per_token(noise * (1.5 if way == "base" else 0.1) + damage, 20),
        "kl": per_token(np.abs(windows.normal(damage, damage / 8, N_WINDOWS)), TOKENS),
        "perplexity": per_token(text + damage + (0.0 if way == "base" else 0.05), TOKENS, exponent=True),
        "choice/arc-easy": Measure(
            0.5 - damage / 3, None, tuple((hardness < 0.5 - damage / 3).astype(float)), (), 0.25
        ),
    }
    name = f"{way}-{quant}.gguf"
    return CellResult(
        way, quant, path=name, sha256=f"{len(name):064x}", size_bytes=int(1e6 * (megabytes + 10 * (way == "live"))),
        measures=measures, speed=Speed(900.0, 12000 / megabytes, 0.3, int(1e6 * megabytes * 1.6), (880.0, 905.0)),
        samples=("light on", NASTY if quant == "Q2_K" else "lamp: on"),
        tensor_types={
            "token_embd.weight": "Q8_0", "output_norm.weight": "F32",
            **{f"blk.{i}.ffn_down.weight": "Q6_K" if i < 2 else "Q4_K" for i in range(6)},
            **{f"blk.{i}.attn_q.weight": "Q4_K" for i in range(6)},
            **{f"blk.{i}.attn_norm.weight": "F32" for i in range(6)},
        },
        files=(UsedFile("model", name, f"{len(name):064x}", int(1e6 * megabytes)),),
    )  # fmt: skip


def made_up_report() -> Report:
    cells = [made_up_cell(way, quant) for way in ("base", "live", "merged") for quant in LEVELS]
    failed = CellResult("imatrix", "Q2_K", "failed", f"llama.cpp refused it: {NASTY}")
    data = (UsedFile("task", "home.jsonl", "a" * 64, 9000), UsedFile("text", "wiki.txt", "b" * 64, 1_290_000))
    provenance = Provenance(
        'edgelora report base.gguf --adapter "my home" --quants Q2_K,Q4_K_M', "2026-01-02T03:04:05Z", "a CPU", 1, (0,),
        {"edgelora": "0.1.0"}, data, settings={"metric": "json", "flash attention": True, "windows": 16},
    )  # fmt: skip
    samples = (Sample("Turn the light on.", "light on"), Sample(NASTY, "lamp: on"))
    return Report("Made-up figures", (*cells, failed), provenance, samples)
