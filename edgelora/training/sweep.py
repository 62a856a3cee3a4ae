"""A sweep decided: which trials there are, who trains how far, who is best. Trains nothing, and knows no torch."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from edgelora.config import TrainConfig
from edgelora.errors import ConfigError
from edgelora.faults import in_words, no_such_setting
from edgelora.files.atomic import MOST_BYTES

SHORT = {"lr": "learning_rate"}
MEASURED_BY = (
    "objective", "beta", "desirable_weight", "undesirable_weight", "loss_on", "data_format", "truncate", "max_length",
    "chat_template",
)  # fmt: skip
ONE_FOR_ALL = {
    **dict.fromkeys(("base", "original", "data", "valid", "out", "resume", "overwrite"), "it is one for all trials"),
    **dict.fromkeys(MEASURED_BY, "held-out losses would be measured differently, and could not be compared"),
}
EXAMPLE = "--sweep rank=4,8,16 lr=1e-4,5e-4"


@dataclass(frozen=True)
class Trial:
    """settings: the swept ones, by their full names. config: of the whole run, whose `out` is the trial's own."""

    name: str
    settings: dict[str, Any]
    config: TrainConfig


class Result(BaseModel):
    """How far a trial has come, and how it did there.

    held_out: (step, loss), None for a loss that is no number. adapter_loss: of the adapter, once the run has ended.
    fault: why it can never end.
    """

    model_config = ConfigDict(frozen=True)

    step: int
    total: int
    held_out: tuple[tuple[int, float | None], ...]
    seconds: float
    ended: bool = False
    adapter_loss: float | None = None
    fault: str | None = None

    def reached(self, share: float) -> bool:
        """Whether nothing is left to train until `share` of the run."""
        return self.ended or self.fault is not None or self._measured(share) is not None

    def loss_at(self, share: float) -> float:
        """The first held-out loss at or behind `share` of the run, whatever was trained since; infinite without one."""
        measured = self._measured(share)
        if self.ended and (share == 1 or measured is None):
            loss = self.adapter_loss
        else:
            loss = None if measured is None else measured[1]
        return math.inf if loss is None else loss

    def _measured(self, share: float) -> tuple[int, float | None] | None:
        return next((point for point in self.held_out if point[0] >= share * self.total), None)


@dataclass(frozen=True)
class Standing:
    """What became of a trial: it was stopped at `share` of its run (1: not at all)."""

    trial: Trial
    result: Result
    share: float

    @property
    def loss(self) -> float:
        """The held-out loss it was judged by."""
        return self.result.loss_at(self.share)


# -- who trains how far -------------------------------------------------------------------------------------------


def successive_halving(trials: Sequence[Trial], train: Callable[[Trial, float], Result]) -> Iterator[Standing]:
    """Yield every trial as it is stopped, the best one last: Hyperband's inner loop with η = 2 (arXiv:1603.06560).

    `train(trial, share)` brings a trial to `share` of its run. All train to the first rung, the better half of them to
    twice as far, until one is left, which trains to the end. Deterministic: of equals the one named first goes on. One
    that has a fault never does.
    """
    left, share = list(trials), first_rung(len(trials))
    while left:
        share = 1.0 if len(left) == 1 else share
        standings = [Standing(trial, train(trial, share), share) for trial in left]
        standings.sort(key=lambda s: (s.result.fault is not None, s.loss))
        n_kept = 0 if share == 1 else math.ceil(len(left) / 2)
        kept = [s.trial for s in standings[:n_kept] if s.result.fault is None]
        yield from reversed(standings[len(kept) :])
        left, share = kept, 2 * share


def first_rung(n_trials: int) -> float:
    """The share of a run after which the first half of the trials is stopped: one halving for each doubling of it."""
    return 0.5 ** (n_trials - 1).bit_length()


def work(n_trials: int) -> float:
    """How many whole runs the sweep trains as much as, if losses are measured at its very rungs."""
    share, done, runs = first_rung(n_trials), 0.0, 0.0
    while share <= 1:
        runs += n_trials * (share - done)
        n_trials, done, share = math.ceil(n_trials / 2), share, 2 * share
    return runs


# -- which trials there are ---------------------------------------------------------------------------------------


def trials_of(config: TrainConfig, words: Iterable[str]) -> list[Trial]:
    """Every combination of `rank=4,8` and `lr=1e-4,5e-4`, in the order in which they are written.

    Each trial's `out` is a folder of its own in `sweep_folder`. Raises ConfigError that names every fault of the words.
    """
    faults: list[str] = []
    swept: dict[str, list[Any]] = {}
    for word in words:
        name, _, values = word.partition("=")
        name = name.replace("-", "_")
        name = SHORT.get(name, name)
        if fault := _fault(name, values):
            faults.append(f"{word}: {fault}")
            continue
        for text in values.split(","):
            try:
                value = getattr(_with(config, {name: text}), name)
            except ValidationError as e:
                faults.append(f"{name}={text}: {in_words(TrainConfig, e.errors()[0])}")
            else:
                several = swept.setdefault(name, [])
                several += [] if value in several else [value]
    if faults:
        raise ConfigError(
            what=f"--sweep {'; '.join(faults)}",
            why="every value is checked before the first trial begins",
            fix=f"write it as {EXAMPLE}; the settings are those of `edgelora train --help`",
        )
    combined = [dict(zip(swept, values, strict=True)) for values in product(*swept.values())]
    return [_trial(config, name, settings) for name, settings in zip(_names(combined), combined, strict=True)]


def _fault(name: str, values: str) -> str | None:
    field = TrainConfig.model_fields.get(name)
    if field is None:
        return no_such_setting(name, TrainConfig)
    if not values:
        return "no values"
    if get_origin(field.annotation) is tuple and name not in ONE_FOR_ALL:
        return "it holds several values at once, and a comma cannot tell them apart"
    return ONE_FOR_ALL.get(name)


def _trial(config: TrainConfig, name: str, settings: dict[str, Any]) -> Trial:
    own = {"out": config.out.with_name(f"{config.out.name}.sweep") / name, "resume": True, "overwrite": False}
    return Trial(name, settings, _with(config, settings | own))


def _with(config: TrainConfig, settings: dict[str, Any]) -> TrainConfig:
    return TrainConfig.model_validate({name: getattr(config, name) for name in config.model_fields_set} | settings)


# -- what they are called -----------------------------------------------------------------------------------------


def _names(trials: Sequence[dict[str, Any]]) -> list[str]:
    """A folder's name for each: its settings, and a digest of them where another is called so, or that is too long."""
    short = {full: name for name, full in SHORT.items()}
    names = [",".join(f"{short.get(full, full)}={_as_word(value)}" for full, value in t.items()) for t in trials]
    # a run's own folder bears the name of its trial and `.run`
    times = Counter(taken for name in names for taken in (name, f"{name}.run"))
    return [
        name if times[name] == times[f"{name}.run"] == 1 and len(os.fsencode(name)) <= MOST_BYTES
        else _digested(name, settings)
        for name, settings in zip(names, trials, strict=True)
    ]  # fmt: skip


def _digested(name: str, settings: dict[str, Any]) -> str:
    """`name`, cut where it is too long, and what its settings are to no other trial."""
    said = ",".join(f"{full}={value}" for full, value in settings.items())
    digest = hashlib.sha256(os.fsencode(said)).hexdigest()[:8]
    return f"{os.fsencode(name)[: MOST_BYTES - len(digest) - 1].decode(errors='ignore')}~{digest}"


def _as_word(value: Any) -> str:
    """A value as it can stand in the name of a folder."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return re.sub(r"[^\w.+-]", "-", str(value))
