"""What a step of each method takes against a LoRA's: in one process, each with a step in every round."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median

from study.room import Room

from edgelora.base.decoder import COMPUTE, build_decoder
from edgelora.base.model import open_base
from edgelora.device import choose_products, compute_threads, computing
from edgelora.errors import EdgeloraError
from edgelora.peft.inject import inject, kept_beside
from edgelora.progress import Progress
from edgelora.training.job import Job
from edgelora.training.loop import train
from edgelora.training.objectives import objective_of
from edgelora.training.rows import load_rows
from edgelora.training.settle import settle
from edgelora.training.state import State
from edgelora.training.where import where_of
from learning.jobs import check
from learning.rows import OF_SOURCE, REFERENCE, Row, named, rows
from learning.work import config_of, path_of

ROUNDS = 5  # beside the first, which warms up


class OneStep:
    """A `loop.Watch` that asks to stop behind every step, and keeps nothing."""

    def stepped(self, progress: Progress, tokens: int, seconds: float) -> None:
        pass

    def save(self, state: State) -> None:
        pass

    def asked_to_stop(self) -> bool:
        return True

    def peak_bytes(self) -> int | None:
        return None


@dataclass
class Stepping:
    """A training that goes on a step at a time."""

    row: Row
    job: Job
    state: State
    seconds: list[float]

    def step(self) -> None:
        start = time.perf_counter()
        train(self.job, self.state, OneStep())
        self.seconds.append(time.perf_counter() - start)


def measure(room: Room, part: int, parts: int, rounds: int = ROUNDS) -> None:
    """Keep what a step takes of every `parts`-th method over the Q4_1 file, or the same weights as float32.

    A LoRA is timed beside each part: what a machine does otherwise changes, and parts would not compare without it.
    """
    asked = [row for row in rows() if row.over in OF_SOURCE][part - 1 :: parts]
    usual = named(REFERENCE)
    with computing(choose_products(), compute_threads()):
        every = list(_stepping(room, [usual, *(row for row in asked if row != usual)]))
        for _ in range(rounds + 1):
            for one in every:
                one.step()
    beside = median(every[0].seconds[1:])
    for one in every:
        if one.row in asked:
            said = {
                "seconds": median(one.seconds[1:]),
                "beside": beside,
                "rounds": rounds,
                "threads": compute_threads(),
            }
            room.keep(f"time/{one.row.name}", said)


def _stepping(room: Room, asked: Iterable[Row]) -> Iterator[Stepping]:
    for row in asked:
        base = open_base(path_of(row.over, room))
        try:
            config = settle(config_of(row, check(row, 1.0), room, room.folder / "none"), base).config
        except EdgeloraError as e:
            room.keep(f"time/{row.name}", {"failed": f"{e.what} ({e.why})"})
            continue
        assert config.rank is not None
        assert config.alpha is not None
        loaded = load_rows(config, base, lambda _: None)
        decoder = build_decoder(base, config.base_dtype, COMPUTE[config.dtype])
        inject(decoder, config.method, config.rank, config.alpha, config.seed, where_of(config))
        job = Job(decoder, objective_of(config), loaded.train, loaded.order(config), config)
        yield Stepping(row, job, State(decoder.named_parameters(), config, kept_beside(decoder)), [])
