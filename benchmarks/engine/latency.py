"""How long one answer waits: for Python, for another adapter, for one from disk, for a conversation of before."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from engine.bare import Bare
from engine.sides import TEXT, adapters_of, answer, engine_with_adapters, random_prompt, ratios, timed


def overhead(base: Path, rounds: int) -> dict[str, Any]:
    """Python's share: 96 tokens by the engine, streamed to another thread, against a bare loop of decode and argmax."""
    from edgelora.base.model import open_base

    prompt = tuple(open_base(base).tokenizer.encode(TEXT).ids)
    sides: dict[str, list[tuple[float, float]]] = {"engine": [], "bare": []}
    with engine_with_adapters(base) as (engine, _):
        bare = Bare(base, 1, 2304)
        n = answer(engine, prompt, 96).generated_tokens

        def by_hand() -> None:
            bare.clear()
            token = bare.evaluate(list(prompt), 0)
            for position in range(len(prompt), len(prompt) + n - 1):
                token = bare.evaluate([token], position)

        for _ in range(rounds + 1):
            sides["bare"].append(timed(by_hand))
            sides["engine"].append(timed(lambda: answer(engine, prompt, 96)))
    wall, cpu = (ratios(*([run[i] for run in sides[side][1:]] for side in ("engine", "bare"))) for i in (0, 1))
    return {"tokens": n, "prompt_tokens": len(prompt), "time_engine_over_bare": wall, "cpu_engine_over_bare": cpu}


def switch(base: Path, rounds: int) -> dict[str, Any]:
    """CPU time that the first token after a switch costs more: by the engine, with hot contexts, by llama.cpp alone."""
    prompt, found = random_prompt(base, 3), dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        bare = Bare(base, 1)
        loras = [bare.load(path) for path in adapters_of(base, Path(folder))[:2]]

        def by_hand(lora: Any | None) -> float:
            bare.clear()

            def first_token() -> None:
                if lora is not None:
                    bare.attach(lora)
                bare.evaluate(list(prompt), 0)

            return timed(first_token)[1]

        for label, hot in (("engine", 0), ("hot", 2)):
            with engine_with_adapters(base, hot_adapters=hot) as (engine, _):

                def ask(i: int) -> float:
                    return timed(lambda: answer(engine, prompt, 1, {str(i): 1.0}))[1]

                for i in range(4):
                    ask(i % 2)
                runs = []
                for _ in range(rounds):
                    same = median(ask(0) for _ in range(40))
                    switched = median(ask(i % 2) for i in range(40))
                    by_hand_switched = median(by_hand(loras[i % 2]) for i in range(40))
                    by_hand_same = median(by_hand(None) for _ in range(40))
                    runs.append((switched - same, by_hand_switched - by_hand_same))
                found[f"{label}_cpu_ms"] = round(1000 * median(a for a, _ in runs), 3)
                found[f"{label}_over_llama_cpp"] = ratios([a for a, _ in runs], [b for _, b in runs])
                found["llama_cpp_cpu_ms"] = round(1000 * median(b for _, b in runs), 3)
                stats = engine.stats()
                found[f"{label}_kv_bytes"], found[f"{label}_contexts"] = stats.kv_bytes, stats.contexts
    return found


def load(base: Path, rounds: int) -> dict[str, Any]:
    """Loading an adapter of rank 16 that was checked before: all of it, its checks, and llama.cpp's own part."""
    from runtime.preflight import preflight

    runs = []
    with engine_with_adapters(base) as (engine, files):
        bare = Bare(base, 1)
        for _ in range(rounds * 4):
            engine.unload("0")
            whole = timed(lambda: engine.load("0", files[0]))
            checks = timed(lambda: preflight(files[0], engine.base))
            loras = []
            own = timed(lambda loaded=loras: loaded.append(bare.load(files[0])))
            bare.C.llama_adapter_lora_free(loras[0])
            runs.append((whole[1], checks[1], own[1]))
    whole_s, checks_s, own_s = (1000 * median(run[i] for run in runs[1:]) for i in range(3))
    return {
        "cpu_ms": round(whole_s, 2), "checks_cpu_ms": round(checks_s, 2), "llama_cpp_cpu_ms": round(own_s, 2),
        "without_checks_over_llama_cpp": ratios([a - b for a, b, _ in runs[1:]], [c for _, _, c in runs[1:]]),
    }  # fmt: skip


def snapshot(base: Path, rounds: int) -> dict[str, Any]:
    """Back to a conversation of 2,080 tokens after another adapter's: restored, against evaluated again."""
    long, short, runs = random_prompt(base, 2080), random_prompt(base, 20, 1), []
    with engine_with_adapters(base) as (engine, _):
        for number in range(min(rounds, 3)):
            cold = (number, *long[1:])
            evaluated = answer(engine, cold, 1, {"0": 1.0})
            answer(engine, short, 1, {"1": 1.0})
            restored = answer(engine, cold, 1, {"0": 1.0})
            assert (evaluated.reused_tokens, restored.reused_tokens) == (0, 2048)
            runs.append((evaluated.prompt_seconds, restored.prompt_seconds))
        kept = engine.stats().snapshot_bytes
    return {
        "prompt_tokens": len(long), "restored_tokens": 2048, "snapshot_bytes": kept,
        "evaluated_s": round(median(a for a, _ in runs), 3), "restored_s": round(median(b for _, b in runs), 4),
        "times_faster": ratios([a for a, _ in runs], [b for _, b in runs]),
    }  # fmt: skip
