"""How many threads llama.cpp should use: measured for a moment, because no rule is right on every machine and load.

Generating on two cores of a quiet machine, two threads were 1.1 times as fast as one; beside other processes they were
5 to 100 times slower: at every step of the graph a thread that runs waits for one that does not.
"""

from __future__ import annotations

import math
import time

from edgelora.device import Choice, physical_cores
from runtime.binding import Context, Entry

TOKENS, ROUNDS = 4, 3
SECONDS = 1.5  # of measuring, beyond which no new round begins
HOPELESS = 4  # times slower than the best after a round: not measured again
WORTH = 0.95  # of the best speed is enough for fewer threads: they leave cores to others, and suffer less from them


def choose_threads(context: Context, cores: int | None = None) -> Choice:
    """Generate a few tokens with one thread, all physical cores and numbers between, by turns; keep the best setting.

    Of settings about as fast the one with the fewest threads is kept. Leaves the context empty.
    """
    cores = cores or physical_cores()
    if cores == 1:
        context.set_threads(1)
        return Choice("1", "this machine has one core")
    times: dict[int, list[float]] = {n: [] for n in _settings(cores)}
    begin = time.perf_counter()
    for number in range(ROUNDS):
        for n, found in times.items():
            hopeless = HOPELESS * min((_mean(t) for t in times.values() if t), default=math.inf)
            if number == 0 or _mean(found) < hopeless:
                found += _measured(context, n, TOKENS * hopeless)
        if time.perf_counter() - begin > SECONDS:
            break
    context.clear()
    speeds = {n: 1 / _mean(found) for n, found in times.items()}
    chosen = min(n for n, speed in speeds.items() if speed >= WORTH * max(speeds.values()))
    context.set_threads(chosen)
    return Choice(str(chosen), ", ".join(f"{speed:.3g} tokens/s with {n}" for n, speed in speeds.items()))


def _settings(cores: int) -> list[int]:
    """Speed rises with threads up to somewhere and then falls: a few numbers find that place nearly."""
    return sorted({1, *range(2, min(cores, 4) + 1), cores // 2, cores * 3 // 4, cores - 1, cores} - {0})


def _measured(context: Context, threads: int, enough_seconds: float) -> list[float]:
    """Seconds of TOKENS single tokens, after one that wakes the threads; of fewer if they take `enough_seconds`."""
    context.set_threads(threads)
    context.clear()
    times = []
    for position in range(TOKENS + 1):
        start = time.perf_counter()
        context.decode([Entry(0, position, 0, True)])
        times.append(time.perf_counter() - start)
        if sum(times[1:]) >= enough_seconds:
            break
    return times[1:]


def _mean(times: list[float]) -> float:
    """What one waits for a token: the rare ones for which a thread had to wait count in full."""
    return sum(times) / len(times)
