"""The job of a run: rows in their order, the decoder that learns them, by which loss; and when it measures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from edgelora.config import TrainConfig
from edgelora.data.order import Order
from edgelora.data.pack import Batch
from edgelora.nn.decoder import Decoder
from edgelora.nn.linear import Delta
from edgelora.peft.method import Method
from edgelora.peft.methods import METHODS
from edgelora.peft.saved import within
from edgelora.progress import Sample
from edgelora.training.objectives.objective import Objective
from edgelora.training.world import Alone, World

MEASUREMENTS = 10  # of the held-out loss in a run, beside that of the base


class Numbered(Protocol):
    """Rows by their numbers: a `Dataset`, or a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Any: ...


@dataclass(frozen=True)
class Job:
    """What is trained on what: rows by their numbers, the order in which they are seen, and rows held out.

    config: rank, learning_rate, micro_batch_tokens … must have been chosen. `sampler` answers a few fixed prompts.
    """

    decoder: Decoder
    objective: Objective[Any]
    rows: Numbered
    order: Order
    config: TrainConfig
    held_out: Numbered = ()
    sampler: Callable[[Decoder], tuple[Sample, ...]] | None = None
    world: World = field(default_factory=Alone)

    @property
    def total(self) -> int:
        return self.order.n_steps(self.config.epochs, self.config.max_steps)

    @property
    def method(self) -> Method:
        return METHODS[self.config.method]

    @property
    def deltas(self) -> list[Delta]:
        found = (within(linear.delta) for linear in self.decoder.linears.values())
        return [delta for delta in found if delta is not None]

    @property
    def eval_every(self) -> int:
        return eval_every(self.config, self.total)

    def is_measured(self, step: int) -> bool:
        """Whether something is measured behind this step: every `eval_every` steps, of the last one, of the base."""
        asked = bool(len(self.held_out)) or self.sampler is not None
        return asked and (step % self.eval_every == 0 or step == self.total)

    def measurements_left(self, step: int) -> int:
        """How many there will be once that of this step is done."""
        every, asked = self.eval_every, self.is_measured(self.total)
        return math.ceil(self.total / every) - step // every if asked and step < self.total else 0

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of a step: the same whenever it is asked for."""
        assert self.config.micro_batch_tokens is not None
        return self.objective.pack([self.rows[i] for i in self.order.rows(step)], self.config.micro_batch_tokens)


def eval_every(config: TrainConfig, total: int) -> int:
    """Steps between two measurements, in a run of `total` steps."""
    return config.eval_every or max(1, math.ceil(total / MEASUREMENTS))


def measurements(config: TrainConfig, total: int) -> int:
    """How many are made in a run that patience does not end: every `eval_every` steps, of the last one, of the base."""
    every = eval_every(config, total)
    return math.ceil(total / every) + (every <= total)
