"""Write docs/performance.md from what the other benchmarks recorded in results/.

python benchmarks/performance.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from peers.page import RESULTS, markdown, training

ROOT = Path(__file__).resolve().parent.parent

HEAD = """# Performance

Written by `python benchmarks/performance.py` from what each benchmark recorded; its command stands above each table.
All sides of a row were measured in turns, in one run, on the processor that is named; ratios are medians over rounds.
"""

STEP = """## What the storage of frozen weights costs

    python benchmarks/step.py --out benchmarks/results/step.json

A float32 step of {tokens} tokens over each, against the same step over dense float32 weights, on {processor}.
"""

PRODUCTS = """## Sums of products

    python benchmarks/products.py --out benchmarks/results/products.json

Microseconds for {tokens} tokens on {cores} cores of {processor}: x is what goes into a layer, W its weight, z = x Aᵀ
and B of a LoRA of rank 16, dy the gradient of what comes out.
"""

BLOCKS = """## Blocks to floats

    python benchmarks/dequantize.py --out benchmarks/results/dequantize.json

GB of float32 written per second on {cores} cores of {processor}; the peer is gguf-py, for NF4
bitsandbytes. Each call is timed behind five others, with its 16 MB in the cache as a step's matrices are.
"""

EXPORT = """## From adapter to one file

    python benchmarks/export.py --tools BIN --llama-cpp SOURCE --out benchmarks/results/export.json

SmolLM2-135M and an adapter of rank {rank}, merged and quantized to {quant} on {processor}: llama.cpp's own
tools, built from SOURCE into BIN, and PEFT with llama.cpp's converter, against one pass. Neither peer
checks its result, so theirs is compared with the writing alone.
"""

MEMORY = """## The memory of a merge, whatever the size of the model

    python benchmarks/export_memory.py --out benchmarks/results/export-memory.json

Synthetic Llamas in bfloat16, sharded, merged with an adapter of rank 16 on all linear layers, on {processor}: the
largest resident set of the process that writes, mapped pages included. The limit is three times the largest tensor, the
embedding of {largest:.0f} MB, and 300 MB. The check behind it takes one layer at a time in torch; llama.cpp maps the
file that it runs.
"""

LIVE = """## One base, many live adapters

    python benchmarks/live.py all

SmolLM2-135M over its Q4_1 GGUF with adapters of rank 16, on {cores} cores of {processor}: the engine against llama.cpp
called by hand, in turns in one run. Of {walk:,} random answers over 8 adapters and the base (tiny models in Q4_K and
Q8_0; loads, switches, blends, reloads under one name, restores), {wrong} were not those of a cold run.
"""

GPU = """## QLoRA of an 8B model on a graphics card

    python benchmarks/gpu.py --together --ragged --out benchmarks/results/gpu.json

{shape}, LoRA of rank 16 on all linear layers, rows of {tokens} tokens, layers computed again, on an {card}
beside an {processor}; random weights, with torch {versions[torch]}, triton {versions[triton]},
transformers {versions[transformers]}, PEFT {versions[peft]} and bitsandbytes {versions[bitsandbytes]} (this project
pins torch 2.13). Each side is a process held to so much of the card's memory; the peer of a ratio is the fastest that
fits there. Medians of {rounds} rounds.
Memory is what torch's allocator had in use at most, and what it took from the card. Of our passes, which are recorded
as CUDA graphs, what is in use was counted while they were recorded: they lie in what was taken. What waits in the
machine's memory is in neither: our layers' inputs and AdamW's moments (`--offload`), the peers' paged 8-bit moments.
Our allocator enlarges what it has taken (expandable segments), the peers' is as torch has it.
"""

GPU_LIMITS = """
What limits a step there, by torch's profiler on the same kind of machine, not recorded: of 220 ms over NF4 the card
computed 200 (products 126, FlashAttention 26, weights out of their blocks 17); for 8 it waited for AdamW's moments, for
10 until Python had put away a step and begun the next. Launched one by one, the 5,200 kernels of a step took 370 ms
there, for the most part Python's. When the record before was made, launched ones took 243 ms by the same profiler, and
the fastest peer 411 in that record: what waits for Python is as fast as the processor. Q4_K was not profiled, and
`torch.compile` not measured there: what it would save, launches and passes over memory, graphs and kernels in Triton
save.
"""

GPU_RAGGED = """
Chats of 50 to 500 tokens behind a common beginning, 32 in a step, packed, over a model of SmolLM2-135M's shape in NF4:
{recorded[median]:,.0f} tokens/s with recorded passes (rounds: {recorded[rounds]}; in a slow one shapes are still being
recorded), {launched[median]:,.0f} with launched ones ({launched[rounds]}): {times:.1f} times as many, in
{recorded[taken]:.1f} GB of the card against {launched[taken]:.1f}.
"""

BUDGET = """## The same bytes, spent where they matter

    python benchmarks/budget.py --text wiki.txt --windows 4 --repair 8 --out benchmarks/results/budget.json

{model}, on {processor}. Mean KL to F16 in nats over {scored_tokens} tokens that were not calibrated on: llama.cpp's own
choice of types, the same with an importance matrix, and types by measured sensitivity at no more bytes.
"""

REPAIR = """`--repair {rank}` writes what quantization took away as a LoRA of rank {rank} beside the file, and keeps it
only where it does more than its bytes do as bits.
"""

GEMMA = """The same for {model}: its rows of 640 fall back to blocks of 32, and its weights were Q4_K_M before, so that
only smaller types are compared (`--gemma`; {scored_tokens} tokens).
"""


def step(result: Mapping[str, Any]) -> str:
    rows = [(r["width"], r["held"], f"{r['mb']:.0f}", f"{r['ratio']:.2f}") for r in result["found"]]
    text = STEP.format(tokens=result["tokens"], processor=result["processor"])
    return text + "\n" + markdown(["width", "held as", "MB", "times the dense step"], rows) + "\n"


def sums(result: Mapping[str, Any]) -> str:
    rows = [
        (r["dtype"], f"{r['d_in']} → {r['d_out']}", r["what"], r["ours_us"], r["torch_us"],
         f"{r['torch_us'] / r['ours_us']:.2f}")
        for r in result["found"]
    ]  # fmt: skip
    head = ["dtype", "layer", "product", "edgelora", "torch", "times torch's speed"]
    return PRODUCTS.format(**result) + "\n" + markdown(head, rows) + "\n"


def blocks(result: Mapping[str, Any]) -> str:
    def row(r: Mapping[str, Any]) -> list[object]:
        ratio = "–" if r["ratio"] is None else f"{r['ratio']:.1f}"
        return [r["type"], r["ours_gb_per_s"], r.get("peer_gb_per_s", "–"), ratio, f"≥ {r['at_least']:g}"]

    head = ["type", "edgelora", "peer", "times the peer", "target"]
    return BLOCKS.format(**result) + "\n" + markdown(head, map(row, result["found"])) + "\n"


def export(result: Mapping[str, Any]) -> str:
    return EXPORT.format(**result) + "\n" + markdown(["", "target", "peer → edgelora", ""], result["table"]) + "\n"


def memory(result: Mapping[str, Any]) -> str:
    kinds = {"hf": "a folder like the base"}
    rows = [
        (f"{r['model_bytes'] / 1e9:.1f}", kinds.get(r["to"], r["to"]), f"{r['peak_bytes'] / 1e6:.0f}",
         f"≤ {r['limit_bytes'] / 1e6:.0f}", "met" if r["met"] else "NOT MET")
        for r in result["rows"]
    ]  # fmt: skip
    largest = max(r["largest_tensor_bytes"] for r in result["rows"]) / 1e6
    text = MEMORY.format(processor=result["processor"], largest=largest)
    return text + "\n" + markdown(["base, GB", "to", "peak, MB", "target", ""], rows) + "\n"


def budget(result: Mapping[str, Any], about: str = BUDGET) -> str:
    def row(r: Mapping[str, Any]) -> list[object]:
        kl = [f"{r[side]['kl_mean']:.3f}" for side in ("plain", "important", "ours")]
        lower = [f"{r[name]:.0%}" for name in ("lower_than_plain", "lower_than_important")]
        return [r["kind"], f"{r['bytes'] / 1e6:.1f}", *kl, *lower]

    head = [
        "bytes of",
        "MB",
        "llama.cpp's choice",
        "with importance",
        "edgelora",
        "lower by (≥ 25 %)",
        "and by (≥ 10 %)",
    ]
    return about.format(**result) + "\n" + markdown(head, map(row, result["rows"])) + "\n" + repair(result["rows"])


def repair(rows: Iterable[Mapping[str, Any]]) -> str:
    """What a LoRA beside each file was worth, where it was tried."""
    tried = [(r["kind"], r["repair"]) for r in rows if r["repair"] is not None]
    if not tried:
        return ""
    head = ["edgelora's file for", "repair, MB", "KL without", "with it", "its bytes as bits", "kept"]
    lines = [
        (kind, f"{r['size_bytes'] / 1e6:.1f}", *(f"{r[f'kl_{side}']:.3f}" for side in ("without", "with", "bits")),
         "yes" if r["kept"] else "no")
        for kind, r in tried
    ]  # fmt: skip
    return "\n" + REPAIR.format(rank=tried[0][1]["rank"]) + "\n" + markdown(head, lines) + "\n"


def live(result: Mapping[str, Any]) -> str:
    """Each line of what the live engine is held to: what, target, found."""
    switch, load, memory, server = (result[name] for name in ("switch", "load", "memory", "server"))
    kept, chosen = result["snapshot"], result["threads"]
    hot = (switch["hot_kv_bytes"] - switch["engine_kv_bytes"]) / 1e6
    lines = [
        ["a switch of adapters before the next token, CPU ms, llama.cpp's own", "≤ 1×",
         f"{switch['engine_over_llama_cpp']:.2f}× ({switch['engine_cpu_ms']:.1f} ms)"],
        [f"the same with a context for each set of adapters, {hot:.0f} MB of KV each", "",
         f"{max(switch['hot_cpu_ms'], 0):.1f} ms"],
        ["loading an adapter without its checks, times llama.cpp's own", "≤ 1.5×",
         f"{load['without_checks_over_llama_cpp']:.2f}× (and {load['checks_cpu_ms']:.1f} ms of checks)"],
        [f"back to a conversation of {kept['prompt_tokens']:,} tokens by its state, times faster than reading it",
         "≥ 20×", f"{kept['times_faster']:.0f}×"],
        ["time of an answer, times a bare loop of decodes", "≤ 1.03×",
         f"{result['overhead']['time_engine_over_bare']:.3f}×"],
        ["threads chosen, of the best number's speed, quiet / beside a busy process", "≥ 0.9×",
         " / ".join(f"{chosen[load]['chosen_over_best']:.2f}×" for load in ("quiet", "busy"))],
        ["8 conversations over 4 adapters, times llama-server (a portable build)", "≥ 1×",
         f"{server['engine_over_server']:.2f}× (one conversation: {server['one_conversation_over_server']:.2f}×)"],
        ["memory above llama.cpp's own", "≤ 60 MB", f"{memory['more_bytes'] / 1e6:.0f} MB"],
        [f"growth over {result['cycles']['cycles']:,} cycles of load, switch and unload", "< 5 MB",
         f"{result['cycles']['growth_bytes'] / 1e6:.1f} MB"],
    ]  # fmt: skip
    walked = result["walk"].values()
    about = LIVE.format(
        **result["about"], walk=sum(w["answers"] for w in walked), wrong=sum(w["wrong"] for w in walked)
    )
    return about + "\n" + markdown(["", "target", "found"], lines) + "\n"


REPORT = """## What the text of a report costs against llama-perplexity

    python benchmarks/report.py --base F16.gguf --text wiki.txt --tools BIN --room FOLDER \\
        --chunks 12 --rounds 3  # once before with --prepare

Seconds of a process that scores {chunks} windows of {context} tokens, {threads} threads of {processor}, medians of
{rounds} rounds in turns. A report's cell has perplexity, bits per byte, KL and same top. Target: all levels in at most
{target} times llama-perplexity's own time.
"""


def report(result: Mapping[str, Any]) -> str:
    sides, whole = result["levels"], result["whole"]
    rows = [[quant, *(f"{by_level[quant]:.2f}" for by_level in sides.values())] for quant in next(iter(sides.values()))]
    rows.append(["**all levels**", *(f"**{whole[side]:.1f}**" for side in sides)])
    over, plain = result["over_with_kl"], result["over_plain"]
    found = f"In all {over:.2f} times llama-perplexity with KL, {plain:.2f} times without."
    return REPORT.format(**result) + "\n" + markdown(["level", *sides], rows) + f"\n\n{found}\n"


KILL = """## Killed while it trains

    python benchmarks/kill.py --out benchmarks/results/kill.json

Of {kills} kills of a training run at random moments ({in_startup} before a first step), {corrupt} left a corrupt
checkpoint, and {different} of the {finished} runs that went on to their end had another curve or adapter than one that
nobody stopped.
"""


def kill(result: Mapping[str, Any]) -> str:
    return KILL.format(**{**result, **{name: len(result[name]) for name in ("corrupt", "different")}})


def gpu(result: Mapping[str, Any]) -> str:
    def row(r: Mapping[str, Any]) -> list[object]:
        if not r["fits"]:
            return [r["hold"], r["side"], "out of memory", "", "", "", "", ""]
        taken = max(visit.get("reserved_bytes", 0) for visit in result["visits"][r["hold"]][r["side"]])
        memory = [f"{n / 1e9:.2f}" if n else "–" for n in (r.get("used_bytes", 0), taken)]
        ratios = [f"{r[key]:.{digits}f}" if key in r else "" for key, digits in (("speed", 2), ("memory", 3))]
        verdict = "" if "met" not in r else "met" if r["met"] else "NOT MET"
        if verdict == "met" and "speed" not in r:
            verdict = "met there: it runs where no peer fits"
        return [
            r["hold"],
            r["side"],
            f"{r['tokens_per_s']:.0f}",
            *memory,
            *ratios,
            verdict,
        ]

    head = [
        "held to",
        "side",
        "tokens/s",
        "GB in use",
        "GB taken",
        "times the peer's speed (≥ 1.8)",
        "its memory (≤ 0.6)",
        "",
    ]
    text = GPU.format(**result) + "\n" + markdown(head, map(row, result["rows"])) + "\n" + GPU_LIMITS
    ways = {
        name: {
            "median": median,
            "rounds": ", ".join(f"{visit['tokens_per_s']:,.0f}" for visit in result["visits"]["ragged"][name]),
            "taken": max(visit["reserved_bytes"] for visit in result["visits"]["ragged"][name]) / 1e9,
        }
        for name, median in result["ragged"].items()
    }
    times = result["ragged"]["recorded"] / result["ragged"]["launched"]
    return text + GPU_RAGGED.format(**ways, times=times)


def written() -> str:
    """The whole text."""
    parts: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "train": training, "products": sums, "step": step, "dequantize": blocks, "export": export,
        "export-memory": memory, "budget": budget, "budget-gemma": partial(budget, about=GEMMA), "live": live,
        "report": report, "kill": kill,
    }  # fmt: skip
    found = {name: RESULTS / f"{name}.json" for name in parts}
    if (measured := RESULTS / "gpu.json").exists():  # where a graphics card was at hand
        parts["gpu"], found["gpu"] = gpu, measured
    texts = [
        make(json.loads(found[name].read_text(encoding="utf-8")))
        for name, make in parts.items()
        if found[name].exists()
    ]
    return "\n".join([HEAD, *texts])


if __name__ == "__main__":
    (ROOT / "docs" / "performance.md").write_text(written(), encoding="utf-8")
