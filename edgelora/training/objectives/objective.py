"""What an objective is, and the mean of a step or of held-out rows, which no size of micro-batch changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from edgelora.config import TrainConfig
from edgelora.data.pack import Batch
from edgelora.nn.decoder import Decoder

Row = TypeVar("Row", contravariant=True)


@dataclass(frozen=True)
class Mean:
    """A mean in the making: those of parts are added, and the sum is that of the whole."""

    total: float
    count: float

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        """0 of nothing."""
        return self.total / self.count if self.count else 0.0


NOTHING = Mean(0.0, 0.0)


@dataclass(frozen=True)
class Settings:
    """What a loss needs beside its batch."""

    beta: float
    label_smoothing: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    step_mean: float = 0.0
    """What `Objective.step_mean` came to over all batches of the step, on all processes."""


class Scored(NamedTuple):
    """The loss of a batch, to be differentiated, and numbers to show beside it (by the names that TRL gives them)."""

    loss: Tensor
    numbers: dict[str, Mean]


class Objective(Protocol[Row]):
    """What a step minimises. It holds no state: the same batch and adapter give the same loss."""

    name: str
    paper: str
    rows: type
    """What `pack` takes: Example, Pair or Labelled."""
    shows: tuple[str, ...]
    """The names of all numbers that `loss` may give: each process of a step has the same ones to add up."""

    def pack(self, rows: Sequence[Row], max_tokens: int, /) -> list[Batch]:
        """The micro-batches of a step over `rows`, of about `max_tokens` tokens. Deterministic."""
        ...

    def units(self, batch: Batch, /) -> float:
        """How many of what the loss of a step is a mean over are in `batch`: tokens to learn, pairs or rows."""
        ...

    def step_mean(self, decoder: Decoder, batches: Sequence[Batch], /) -> Mean:
        """A number that the loss of each batch needs of all batches of the step. Never differentiated."""
        ...

    def loss(self, decoder: Decoder, batch: Batch, settings: Settings, /) -> Scored:
        """Sum of the loss over the units of `batch`."""
        ...


def mean_losses(
    objective: Objective[Row],
    decoder: Decoder,
    batches: Sequence[Batch | None],
    config: TrainConfig,
    over_processes: Callable[[list[float]], list[float]] = lambda sums: sums,
    first: int = 0,
) -> Iterator[Scored]:
    """The share of each micro-batch in the loss of the step: together they are its mean over all units of the step.

    One at a time: go backward through each before the next is asked for, so that one graph is alive. The `first` ones
    are passed over: their gradients are there already. A None is another process's micro-batch, and no work here.
    `over_processes` adds up the numbers it is given over all processes that share the step; gradients are then summed.
    """
    mine = [batch for batch in batches if batch is not None]
    here = objective.step_mean(decoder, mine)
    units, total, count = over_processes([sum(map(objective.units, mine)), here.total, here.count])
    settings = Settings(
        config.beta, config.label_smoothing, config.desirable_weight, config.undesirable_weight,
        step_mean=Mean(total, count).value,
    )  # fmt: skip
    for batch in mine[first:]:
        scored = objective.loss(decoder, batch, settings)
        yield scored._replace(loss=scored.loss / units)


def held_out(
    objective: Objective[Row], decoder: Decoder, rows: Sequence[Row], config: TrainConfig, max_tokens: int
) -> tuple[float, dict[str, float]]:
    """The loss over `rows`, without label smoothing, and the mean of each number beside it."""
    scored = score_held_out(objective, decoder, objective.pack(rows, max_tokens), config)
    return sum(float(s.loss) for s in scored), means(scored)


@torch.no_grad()
def score_held_out(
    objective: Objective[Row],
    decoder: Decoder,
    batches: Sequence[Batch | None],
    config: TrainConfig,
    over_processes: Callable[[list[float]], list[float]] = lambda sums: sums,
) -> list[Scored]:
    """What each micro-batch of rows held out adds to the loss over all of them; see `mean_losses`."""
    plain = config.model_copy(update={"label_smoothing": 0.0})
    return list(mean_losses(objective, decoder, batches, plain, over_processes))


def means(scored: Sequence[Scored]) -> dict[str, float]:
    """Each number over all batches."""
    return values(added({}, (s.numbers for s in scored)))


def added(sums: Mapping[str, Mean], more: Iterable[Mapping[str, Mean]]) -> dict[str, Mean]:
    """`sums` and what is in `more`, name by name."""
    found = dict(sums)
    for name, part in (item for numbers in more for item in numbers.items()):
        found[name] = found.get(name, NOTHING) + part
    return found


def over_all(
    names: Sequence[str], sums: Mapping[str, Mean], over_processes: Callable[[list[float]], list[float]]
) -> dict[str, float]:
    """The means that `names` have over all processes: one exchange, of the same length in each."""
    if not names:
        return {}
    mine = [sums.get(name, NOTHING) for name in names]
    flat = over_processes([number for mean in mine for number in (mean.total, mean.count)])
    return values({name: Mean(*flat[2 * i : 2 * i + 2]) for i, name in enumerate(names)})


def values(sums: Mapping[str, Mean]) -> dict[str, float]:
    """What is shown. A mean of nothing (no row of that kind), or one that is no finite number, is left out."""
    found = {name: mean.value for name, mean in sums.items() if mean.count and math.isfinite(mean.value)}
    chosen, rejected = found.get("rewards/chosen"), found.get("rewards/rejected")
    if "rewards/margins" not in sums and chosen is not None and rejected is not None:
        found["rewards/margins"] = chosen - rejected  # without pairs, as TRL has it: that of the means
    return found
