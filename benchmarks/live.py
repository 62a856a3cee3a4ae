"""What the live engine costs and saves, each figure as a ratio to llama.cpp itself in the same run.

    .venv/bin/python benchmarks/live.py PIECE… [--base FILE] [--rounds 5] [--out benchmarks/results/live.json]

PIECE: overhead, switch, load, snapshot, threads, memory, server, walk, cycles; `all` for all. Each is measured in a
process of its own and replaces its part of the file. Its two sides take turns in every round; medians of rounds.
`walk` and `cycles` are tests (test_states.py, test_endurance.py) with 4 x 500 answers and 10,000 cycles. `server` needs
xllamacpp, which carries llama-server prebuilt for any CPU of its kind, so the side of one conversation is shown too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
N_ADAPTERS, RANK = 4, 16
TEXT = (
    "A long winter had closed the pass, and the two villages that shared the valley learned of each other only by "
    "the smoke they saw. When the thaw came, "
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="+", choices=[*PIECES, "all"])
    parser.add_argument("--base", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "live.json")
    parser.add_argument("--here", action="store_true", help="measure in this process and print (the child's side)")
    given = parser.parse_args()
    if given.here:
        print(json.dumps(PIECES[given.pieces[0]](given.base, given.rounds)))
        return
    if given.base is None:
        from edgelora.pipeline.quickstart import default_base

        given.base = default_base()
    for piece in PIECES if "all" in given.pieces else given.pieces:
        words = [sys.executable, __file__, piece, "--here", "--base", str(given.base), "--rounds", str(given.rounds)]
        with tempfile.TemporaryDirectory() as home:
            done = subprocess.run(
                words, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "EDGELORA_HOME": home}
            )
        _record(given.out, piece, json.loads(done.stdout.splitlines()[-1]))
    print(given.out.read_text())


def _record(out: Path, piece: str, found: dict[str, Any]) -> None:
    from edgelora.device import processor_name
    from edgelora.versions import versions

    kept = json.loads(out.read_text()) if out.exists() else {}
    kept = {name: part for name, part in kept.items() if name in PIECES} | {piece: found}
    about = {"processor": processor_name(), "cores": os.cpu_count(), "versions": versions()}
    out.write_text(
        json.dumps({"about": about, **{name: kept[name] for name in PIECES if name in kept}}, indent=2) + "\n"
    )


# -- what the pieces share --------------------------------------------------------------------------------------------


def adapters_of(path: Path, folder: Path) -> list[Path]:
    """Seeded adapters of rank 16 on all linears, as `export` writes them."""
    import numpy as np

    from converters.adapter_to_gguf import write_adapter_gguf
    from edgelora.base.model import open_base
    from edgelora.files.contract import BaseFile, Contract
    from edgelora.peft.adapter import Adapter

    base, made = open_base(path), []
    contract = Contract(
        version="benchmark", base=base.fingerprint, base_file=BaseFile(name=path.name, quant=base.quant, sha256="0"),
        tokenizer_sha256=base.tokenizer.sha256, chat_template_sha256=base.template_sha256,
        eog_ids=base.tokenizer.eog_ids, method="lora",
    )  # fmt: skip
    for seed in range(N_ADAPTERS):
        draw = np.random.default_rng(seed)
        tensors = {
            name: {"lora_A": draw.normal(0, d_in**-0.5, (RANK, d_in)).astype(np.float32),
                   "lora_B": draw.normal(0, 0.01, (d_out, RANK)).astype(np.float32)}
            for name, (d_out, d_in) in base.linears.items()
        }  # fmt: skip
        made.append(folder / f"{seed}.gguf")
        settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2.0 * RANK}
        write_adapter_gguf(made[-1], Adapter(settings, tensors, contract), base, str(seed))
    return made


class Bare:
    """llama.cpp through llama_cpp's ctypes alone: a context of its own over a model of its own."""

    def __init__(self, base: Path, threads: int, n_ctx: int = 2048) -> None:
        import llama_cpp as C

        import runtime.binding  # noqa: F401  (libgomp is then told the same)

        self.C = C
        self.model = C.llama_model_load_from_file(str(base).encode(), _without_gpu(C))
        settings = C.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.no_perf = n_ctx, 64, 64, True
        settings.n_threads = settings.n_threads_batch = threads
        self.context = C.llama_init_from_model(self.model, settings)
        self.memory = C.llama_get_memory(self.context)
        self.n_vocab = C.llama_vocab_n_tokens(C.llama_model_get_vocab(self.model))
        self.batch = C.llama_batch_init(64, 0, 1)

    def clear(self) -> None:
        self.C.llama_memory_clear(self.memory, True)

    def evaluate(self, tokens: list[int], first: int) -> int:
        """The likeliest token behind `tokens`, in pieces of 64."""
        import numpy as np

        batch = self.batch
        for start in range(0, len(tokens), 64):
            part = tokens[start : start + 64]
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, first + start + i, 1, 0
                batch.logits[i] = start + i == len(tokens) - 1
            assert self.C.llama_decode(self.context, batch) == 0
        return int(np.ctypeslib.as_array(self.C.llama_get_logits(self.context), shape=(self.n_vocab,)).argmax())

    def load(self, path: Path) -> Any:
        return self.C.llama_adapter_lora_init(self.model, str(path).encode())

    def attach(self, lora: Any) -> None:
        import ctypes

        pointers, scales = (self.C.llama_adapter_lora_p_ctypes * 1)(lora), (ctypes.c_float * 1)(1.0)
        assert self.C.llama_set_adapters_lora(self.context, pointers, 1, scales) == 0


def _without_gpu(C: Any) -> Any:
    settings = C.llama_model_default_params()
    settings.n_gpu_layers = 0
    return settings


@contextmanager
def engine_with_adapters(base: Path, **settings: Any) -> Iterator[Any]:
    """An engine on one thread unless told otherwise, and the files of its adapters, loaded as 0, 1, 2, 3."""
    from runtime.engine import Engine
    from runtime.service import EngineConfig

    with tempfile.TemporaryDirectory() as folder:
        files = adapters_of(base, Path(folder))
        with Engine.open(base, EngineConfig(**{"threads": 1, "context": 2304, **settings})) as engine:
            for name, path in enumerate(files):
                engine.load(str(name), path)
            yield engine, files


def answer(engine: Any, prompt: tuple[int, ...], n: int, adapters: dict[str, float] | None = None) -> Any:
    """Usage of an answer that does not end before `n` tokens, where the sampler lets it."""
    from runtime.service import Request

    stream = engine.generate(Request(prompt, adapters or {}, max_tokens=n))
    for _ in stream:
        pass
    return stream.usage


def timed(do: Callable[[], Any]) -> tuple[float, float]:
    """(seconds, CPU seconds of all threads) of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    do()
    return time.perf_counter() - wall, time.process_time() - cpu


def random_prompt(base: Path, n: int, seed: int = 0) -> tuple[int, ...]:
    import numpy as np

    from edgelora.base.model import open_base

    return tuple(np.random.default_rng(seed).integers(1000, len(open_base(base).tokenizer.tokens), n).tolist())


def ratios(ours: list[float], theirs: list[float]) -> float:
    """The median of the rounds' ratios: each round's two sides ran one after the other."""
    return round(median(a / b for a, b in zip(ours, theirs, strict=True)), 4)


# -- the pieces -------------------------------------------------------------------------------------------------------


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


RESIDENT = """
import os, sys
def resident():
    fields = dict(line.split(':', 1) for line in open('/proc/self/status'))
    return (int(fields['RssAnon'].split()[0]) + int(fields['RssShmem'].split()[0])) * 1024
"""


def memory(base: Path, rounds: int) -> dict[str, Any]:
    """Private memory of a process that answers, by the engine and by the binding alone; mapped files do not count."""
    bare = (
        RESIDENT + "import ctypes, llama_cpp as C, numpy as np\n"
        "s = C.llama_model_default_params(); s.n_gpu_layers = 0\n"
        "m = C.llama_model_load_from_file(sys.argv[1].encode(), s)\n"
        "p = C.llama_context_default_params(); p.n_ctx = 2048; p.n_batch = p.n_ubatch = 64\n"
        "c = C.llama_init_from_model(m, p); b = C.llama_batch_init(64, 0, 1)\n"
        "for start in range(0, 128, 64):\n"
        "    b.n_tokens = 64\n"
        "    for i in range(64):\n"
        "        b.token[i], b.pos[i], b.n_seq_id[i], b.seq_id[i][0], b.logits[i] = 7, start + i, 1, 0, i == 63\n"
        "    C.llama_decode(c, b)\n"
        "print(resident())\n"
    )
    ours = (
        RESIDENT + "from pathlib import Path\nfrom runtime.engine import Engine\n"
        "from runtime.service import EngineConfig, Request\n"
        "engine = Engine.open(Path(sys.argv[1]), EngineConfig(context=2048, threads=1))\n"
        "list(engine.generate(Request((7,) * 130, max_tokens=4)))\nprint(resident())\nengine.close()\n"
    )

    def run(code: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", code, str(base)], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT
        )
        return int(done.stdout.splitlines()[-1])

    runs = [(run(ours), run(bare)) for _ in range(min(rounds, 3))]
    return {
        "engine_bytes": int(median(a for a, _ in runs)), "llama_cpp_bytes": int(median(b for _, b in runs)),
        "more_bytes": int(median(a - b for a, b in runs)),
    }  # fmt: skip


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


def _tests(name: str, **settings: str) -> dict[str, Any]:
    """Run tests with more of the same, in their own words."""
    words = [sys.executable, "-m", "pytest", "-q", "-rA", str(ROOT / "tests" / name)]
    start = time.perf_counter()
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stdout)
    said = [line for line in done.stdout.splitlines() if line.startswith("MEASURED ")]
    return {
        "seconds": round(time.perf_counter() - start, 1),
        **{k: v for m in said for k, v in json.loads(m[9:]).items()},
    }


def walk(_base: Path, _rounds: int) -> dict[str, Any]:
    return _tests("test_states.py", EDGELORA_WALK="500")


def cycles(_base: Path, _rounds: int) -> dict[str, Any]:
    return _tests("test_endurance.py", EDGELORA_CYCLES="10000")


PIECES: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "overhead": overhead, "switch": switch, "load": load, "snapshot": snapshot, "threads": threads,
    "memory": memory, "server": server, "walk": walk, "cycles": cycles,
}  # fmt: skip

if __name__ == "__main__":
    main()
