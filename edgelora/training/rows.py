"""The rows of a run, read, encoded and checked: what is trained on, what is held out, and what they are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from edgelora.base.model import Base
from edgelora.config import TrainConfig
from edgelora.data.check import Check, Tally
from edgelora.data.dataset import Dataset, Options, load_examples, load_labelled, load_pairs
from edgelora.data.fit import Encoder
from edgelora.data.order import Order
from edgelora.files.contract import sha256_file
from edgelora.training.invoked import require_invoked


@dataclass(frozen=True)
class Described:
    """A file or folder of rows, for the contract. sha256: of a file's bytes; empty for a folder."""

    name: str
    rows: int
    weight: float
    sha256: str


@dataclass(frozen=True)
class Rows:
    """train: the rows to learn. valid: those held out, empty if there are none."""

    train: Dataset[Any]
    valid: Dataset[Any] | tuple[()]
    check: Check
    sources: tuple[Described, ...]

    @property
    def valid_sha256(self) -> str:
        return self.valid.sha256 if isinstance(self.valid, Dataset) else ""

    def order(self, config: TrainConfig) -> Order:
        """In which order they are learned, each source by its weight."""
        return Order(self.train.counts, config.batch_rows, config.seed, [source.weight for source in self.sources])


def load_rows(config: TrainConfig, base: Base, on_note: Callable[[str], None]) -> Rows:
    """Everything that `config` names, held to its max_length. `on_note` hears what is odd.

    Raises DataError for what is broken, too long, or has nothing to learn.
    """
    encoder = Encoder(base, config.max_length, config.truncate, config.loss_on)
    folder = next(p for p in config.out.absolute().parents if p.is_dir())  # for data that is larger than memory
    tally, held_out = Tally(base.tokenizer), Tally(base.tokenizer)
    load = _loader(config.objective)
    paths = [source.path for source in config.data]
    train = load(paths, encoder, options=Options(config.data_format, folder, on_row=tally.add))
    valid: Dataset[Any] | tuple[()] = ()
    if config.valid is not None:
        valid = load([config.valid], encoder, options=Options(config.data_format, folder, on_row=held_out.add))
    check = tally.result(held_out)
    check.raise_faults()
    for warning in check.warnings:
        on_note(warning)
    if config.alora_invocation_tokens:
        require_invoked(config, (train[i] for i in range(len(train))), "data")
        require_invoked(config, (valid[i] for i in range(len(valid))), "valid")
    described = [
        Described(source.path.name, n, source.weight, sha256_file(source.path) if source.path.is_file() else "")
        for source, n in zip(config.data, train.counts, strict=True)
    ]
    return Rows(train, valid, check, tuple(described))


def _loader(objective: str) -> Callable[..., Dataset[Any]]:
    if objective == "sft":
        return load_examples
    return load_labelled if objective == "kto" else partial(load_pairs, objective=objective)
