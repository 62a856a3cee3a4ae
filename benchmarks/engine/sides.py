"""What both sides of a measurement are given, and how two of them become one figure."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

N_ADAPTERS, RANK = 4, 16
TEXT = (
    "A long winter had closed the pass, and the two villages that shared the valley learned of each other only by "
    "the smoke they saw. When the thaw came, "
)


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
