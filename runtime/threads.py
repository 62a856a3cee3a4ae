"""How many threads llama.cpp should use: measured for a moment, because no rule is right on every machine and load."""

from __future__ import annotations

import statistics
import time

from edgelora.device import Choice, physical_cores
from runtime.binding import Context, Entry

TOKENS = 6


def choose_threads(context: Context) -> Choice:
    """Generate a few tokens with 1 thread and with all physical cores, by turns, and keep the faster setting."""
    cores = physical_cores()
    if cores == 1:
        context.set_threads(1)
        return Choice("1", "this machine has one core")
    settings = [1, cores] if cores < 4 else [1, cores // 2, cores]
    times: dict[int, list[float]] = {n: [] for n in settings}
    for _ in range(2):
        for n in settings:
            context.set_threads(n)
            context.clear()
            context.decode([Entry(0, 0, 0, True)])
            for position in range(1, TOKENS):
                start = time.perf_counter()
                context.decode([Entry(0, position, 0, True)])
                times[n].append(time.perf_counter() - start)
    context.clear()
    speed = {n: 1 / statistics.median(t) for n, t in times.items()}
    best = max(speed, key=lambda n: speed[n])
    context.set_threads(best)
    return Choice(str(best), ", ".join(f"{s:.0f} tokens/s with {n}" for n, s in speed.items()))
