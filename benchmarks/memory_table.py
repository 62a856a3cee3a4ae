"""Write docs/memory.md: what fits into 8, 12, 16 and 24 GB, by the memory plan, from published dimensions.

    .venv/bin/python benchmarks/memory_table.py

A test compares the file with what this makes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from gguf.constants import GGMLQuantizationType as Type
from memory import table as recorded

from edgelora.architectures import ARCHITECTURES, ModelConfig, Rope
from edgelora.config import TrainConfig
from edgelora.errors import ConfigError
from edgelora.training.base_footprint import Model
from edgelora.training.memory import SHARE, Machine, plan

ROOT = Path(__file__).resolve().parent.parent
GIGABYTES = (8, 12, 16, 24)
STORED = (Type.Q4_K, Type.Q8_0)
THREADS = 8  # of the compiled code, which multiplies bfloat16 too, whatever this machine has


class Published(NamedTuple):
    """A model's config.json, as far as memory goes."""

    name: str
    model_type: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context: int
    tied: bool


MODELS = (
    Published("SmolLM2-135M", "llama", 576, 1536, 30, 9, 3, 64, 49152, 8192, True),
    Published("Gemma-3-270m", "gemma3_text", 640, 2048, 18, 4, 1, 256, 262144, 32768, True),
    Published("SmolLM2-360M", "llama", 960, 2560, 32, 15, 5, 64, 49152, 8192, True),
    Published("Qwen2.5-0.5B", "qwen2", 896, 4864, 24, 14, 2, 64, 151936, 32768, True),
    Published("Gemma-3-1B", "gemma3_text", 1152, 6912, 26, 4, 1, 256, 262144, 32768, True),
    Published("Llama-3.2-1B", "llama", 2048, 8192, 16, 32, 8, 64, 128256, 131072, True),
    Published("Qwen2.5-1.5B", "qwen2", 1536, 8960, 28, 12, 2, 128, 151936, 32768, True),
    Published("SmolLM2-1.7B", "llama", 2048, 8192, 24, 32, 32, 64, 49152, 8192, True),
    Published("Qwen2.5-3B", "qwen2", 2048, 11008, 36, 16, 2, 128, 151936, 32768, True),
    Published("Llama-3.2-3B", "llama", 3072, 8192, 28, 24, 8, 128, 128256, 131072, True),
    Published("Gemma-3-4B", "gemma3_text", 2560, 10240, 34, 8, 4, 256, 262208, 131072, True),
    Published("Qwen2.5-7B", "qwen2", 3584, 18944, 28, 28, 4, 128, 152064, 131072, False),
    Published("Llama-3.1-8B", "llama", 4096, 14336, 32, 32, 8, 128, 128256, 131072, False),
    Published("Qwen2.5-14B", "qwen2", 5120, 13824, 48, 40, 8, 128, 152064, 131072, False),
)


def model(p: Published, kind: Type) -> Model:
    """The model with every row stored as `kind`, or as Q8_0 where rows do not divide into its blocks."""
    config = ModelConfig(
        model_type=p.model_type, hidden_size=p.hidden_size, intermediate_size=p.intermediate_size,
        num_hidden_layers=p.layers, num_attention_heads=p.heads, num_key_value_heads=p.kv_heads, head_dim=p.head_dim,
        vocab_size=p.vocab_size, max_position_embeddings=p.context, rms_norm_eps=1e-6, rope=Rope(1e4, p.head_dim),
        tie_word_embeddings=p.tied,
    )  # fmt: skip
    whole = kind is Type.Q8_0 or not any(n % 256 for n in (p.hidden_size, p.intermediate_size, p.heads * p.head_dim))
    found = Model.stored_as(ARCHITECTURES[p.model_type], config, kind if whole else Type.Q8_0)
    products = frozenset({"f32", "bf16"})
    return replace(found, threads=THREADS, sums=products, faster=products)


def cell(p: Published, kind: Type, device: str, gigabytes: int) -> str:
    """The longest row, and `*` where layers are computed again for it."""
    config = TrainConfig(
        base=Path(p.name), data=Path(p.name), out=Path("out"), rank=16, alpha=32.0, learning_rate=1e-4, dtype="bf16",
        base_dtype="blocks",
    )  # fmt: skip
    try:
        found = plan(model(p, kind), config, Machine(device, gigabytes * 10**9), p.context)
    except ConfigError:
        return "–"
    return f"{found.config.max_length:,}{'*' if found.config.recompute == 'full' else ''}"


def table(kind: Type, device: str) -> list[str]:
    lines = [
        f"| | weights | {' | '.join(f'{n} GB' for n in GIGABYTES)} |",
        f"|---|---:|{'---:|' * len(GIGABYTES)}",
    ]
    for p in MODELS:
        weights = model(p, kind).n_weights
        cells = " | ".join(cell(p, kind, device, n) for n in GIGABYTES)
        lines.append(f"| {p.name} | {weights / 1e9:.2f} B | {cells} |")
    return lines


def document() -> str:
    lines = [
        "# What fits",
        "",
        "The longest row, in tokens, that a LoRA of rank 16 on all linear layers trains on (AdamW, bf16 products),",
        f"as `edgelora plan` reckons with {SHARE:.0%} of the memory; at most the context. GB are what is free for the",
        "run, not what is built in; `edgelora plan BASE` goes by your machine. `*`: layers are computed",
        "again in the backward pass, which takes longer and a fraction of the memory. –: nothing fits.",
        "Short rows are packed together into micro-batches, and take the memory of one.",
        f"On a CPU the compiled code computes, on {THREADS} threads; with AVX512_BF16 (`edgelora doctor` says).",
        "With AMX 60 MB more are reckoned with, and a CPU that has neither multiplies float32, which takes more too.",
        "",
        "All activations are kept where a micro-batch of them fits, so more memory can show a shorter row without a",
        "`*`: `--recompute full` allows longer ones. `python benchmarks/memory_table.py` writes this file.",
    ]
    for device, title in (("cpu", "A process on the CPU"), ("cuda", "A CUDA card (reckoned)")):
        for kind in STORED:
            lines += ["", f"## {title}, {kind.name} blocks", "", *table(kind, device)]
    lines += ["", "Where rows do not divide into Q4_K's blocks of 256 weights, Q8_0 stands in for it."]
    return "\n".join([*lines, *measured()]) + "\n"


def measured() -> list[str]:
    """The plan against what `memory.py` recorded."""
    found = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text(encoding="utf-8"))
    worst = max((case["error"] for case in found["cases"]), key=abs)
    return [
        "",
        "## The plan against measured peaks",
        "",
        "    python benchmarks/memory.py --out benchmarks/results/memory.json",
        "",
        f"The peak resident memory of {len(found['cases'])} training processes over {found['base']}, on a CPU, against",
        f"the plan made before each. The target is within 10 %; the worst is off by {worst:+.1%}.",
        "",
        *recorded(found["cases"]).splitlines(),
    ]


if __name__ == "__main__":
    path = ROOT / "docs" / "memory.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(document(), encoding="utf-8")
