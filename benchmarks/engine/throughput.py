"""Tokens a second: by the number of threads that was chosen, and of many conversations beside llama-server."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from engine.bare import Bare
from engine.sides import TEXT, answer, engine_with_adapters, ratios


def threads(base: Path, rounds: int) -> dict[str, Any]:
    """The speed of the number of threads that was chosen at opening, over the best of 1…N: quiet, and beside a loop."""
    from edgelora.device import physical_cores
    from runtime.engine import Engine
    from runtime.service import EngineConfig

    found: dict[str, Any] = {"cores": physical_cores()}
    for load_name, n_loops in (("quiet", 0), ("busy", 1)):
        loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n_loops)]
        try:
            with Engine.open(base, EngineConfig(context=512)) as engine:
                chosen = engine.threads
            bare = Bare(base, 1, 512)
            speeds: dict[int, list[float]] = {n: [] for n in range(1, physical_cores() + 1)}
            for _ in range(rounds):
                for n in speeds:
                    bare.C.llama_set_n_threads(bare.context, n, n)
                    bare.clear()
                    tokens, start = 0, time.perf_counter()
                    while tokens < 40 and time.perf_counter() - start < 1.5:
                        bare.evaluate([7], tokens)
                        tokens += 1
                    speeds[n].append(tokens / (time.perf_counter() - start))
        finally:
            for loop in loops:
                loop.kill()
                loop.wait()
        by_n = {n: median(each) for n, each in speeds.items()}
        found[load_name] = {
            "chosen": int(chosen.value), "why": chosen.why,
            "tokens_per_s": {str(n): round(speed, 1) for n, speed in by_n.items()},
            "chosen_over_best": round(by_n[int(chosen.value)] / max(by_n.values()), 3),
        }  # fmt: skip
    return found


def server(base: Path, rounds: int) -> dict[str, Any]:
    """Tokens a second of 8 conversations over 4 adapters, and of one: the engine and llama-server, by turns."""
    import xllamacpp as x

    from edgelora.base.model import open_base

    tokenizer = open_base(base).tokenizer
    prompts = [tuple(tokenizer.encode(f"{TEXT}{number} people ").ids) for number in range(8)]
    n_tokens = 48
    found: dict[str, list[float]] = {}

    callers = ThreadPoolExecutor(8)

    def together(ask: Callable[[int], int], n: int) -> float:
        """Tokens a second of `n` callers at once."""
        start = time.perf_counter()
        counts = list(callers.map(ask, range(n)))
        return sum(counts) / (time.perf_counter() - start)

    with engine_with_adapters(base, conversations=8, hot_adapters=3, context=256, threads=None) as (engine, files):
        n_threads = int(engine.threads.value)
        settings = x.CommonParams()
        settings.model.path = str(base)
        settings.n_parallel, settings.n_ctx, settings.n_gpu_layers, settings.verbosity = 8, 2048, 0, 0
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = n_threads
        settings.lora_adapters = [x.CommonAdapterLoraInfo(str(path), 0.0) for path in files]
        peer = x.Server(settings)

        def ours(i: int) -> int:
            return int(answer(engine, prompts[i], n_tokens, {str(i % 4): 1.0}).generated_tokens)

        def theirs(i: int) -> int:
            asked = {
                "prompt": list(prompts[i]), "n_predict": n_tokens, "temperature": 0.0, "cache_prompt": False,
                "lora": [{"id": j, "scale": float(j == i % 4)} for j in range(4)], "stream": False,
            }  # fmt: skip
            said = peer.handle_completions(asked)
            return int(said["usage"]["completion_tokens"])

        for _ in range(rounds + 1):
            for name, ask in (("engine", ours), ("server", theirs)):
                for n in (8, 1):
                    found.setdefault(f"{name}_{n}", []).append(together(ask, n))
    medians = {f"{name}_tokens_per_s": round(median(values[1:]), 1) for name, values in found.items()}
    return {
        **medians, "threads": n_threads,
        "engine_over_server": ratios(found["engine_8"][1:], found["server_8"][1:]),
        "one_conversation_over_server": ratios(found["engine_1"][1:], found["server_1"][1:]),
    }  # fmt: skip
