"""Speed of an open engine as llama-bench measures it: a prompt of PROMPT tokens, and GENERATE single tokens."""

from __future__ import annotations

import statistics
import time

import numpy as np

from runtime.binding import Context, Entry

PROMPT, GENERATE, REPEATS = 256, 32, 3


def prompt_and_generation_speed(context: Context, n_vocab: int) -> tuple[float, float]:
    """Median tokens/s of evaluating a prompt and of generating, after a warm-up. Leaves the context empty.

    Token ids are random, so nothing is sampled and no answer can end early.
    """
    ids = np.random.default_rng(0).integers(n_vocab, size=PROMPT)
    prompt, single = [], []
    for repeat in range(REPEATS + 1):
        context.clear()
        start = time.perf_counter()
        context.decode([Entry(int(token), i, 0, i == PROMPT - 1) for i, token in enumerate(ids)])
        middle = time.perf_counter()
        context.clear()
        begin = time.perf_counter()
        for i in range(GENERATE):
            context.decode([Entry(int(ids[i]), i, 0, True)])
        end = time.perf_counter()
        if repeat:
            prompt.append(PROMPT / (middle - start))
            single.append(GENERATE / (end - begin))
    context.clear()
    return statistics.median(prompt), statistics.median(single)
