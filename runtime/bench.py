"""Speed of an open engine as llama-bench measures it: a prompt of PROMPT tokens, and GENERATE single tokens."""

from __future__ import annotations

import statistics
import time

import numpy as np

from edgelora.evaluate.protocols import Rates
from runtime.binding import Context, Entry

PROMPT, GENERATE, REPEATS = 256, 32, 3


def prompt_and_generation_speed(context: Context, n_vocab: int) -> tuple[float, float]:
    """Median tokens/s of evaluating a prompt and of generating, after a warm-up. Leaves the context empty."""
    found = rates(context, n_vocab)
    return statistics.median(found.prompt), statistics.median(found.generation)


def rates(context: Context, n_vocab: int) -> Rates:
    """Token ids are random, so nothing is sampled and no answer can end early. Leaves the context empty."""
    ids = np.random.default_rng(0).integers(n_vocab, size=PROMPT)
    prompt, single = [], []
    for _ in range(REPEATS + 1):
        context.clear()
        start = time.perf_counter()
        context.decode([Entry(int(token), i, 0, i == PROMPT - 1) for i, token in enumerate(ids)])
        middle = time.perf_counter()
        context.clear()
        begin = time.perf_counter()
        for i in range(GENERATE):
            context.decode([Entry(int(ids[i]), i, 0, True)])
        end = time.perf_counter()
        prompt.append(middle - start)
        single.append(end - begin)
    context.clear()
    return Rates(
        tuple(PROMPT / seconds for seconds in prompt[1:]),
        tuple(GENERATE / seconds for seconds in single[1:]),
        prompt[0],
    )
