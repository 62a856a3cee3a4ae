"""The rows of a run, read, encoded and checked: what is trained on, what is held out, and what they are called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgelora.base.model import Base
from edgelora.config import TrainConfig
from edgelora.data.check import Check, Tally
from edgelora.data.dataset import Dataset, EncodedRow, Options, load_examples, load_labelled, load_pairs
from edgelora.data.fit import Encoder
from edgelora.data.order import Order
from edgelora.errors import DataError
from edgelora.files.contract import sha256_file
from edgelora.progress import OnProgress, silent
from edgelora.training.adapter_footprint import virtual_tokens
from edgelora.training.footprint import Load
from edgelora.training.invoked import require_invoked
from edgelora.training.objectives import objective_of
from edgelora.training.reading import Reading


@dataclass(frozen=True)
class Described:
    """A file or folder of rows, for the contract. sha256: of a file's bytes; empty for a folder."""

    name: str
    rows: int
    weight: float
    sha256: str


@dataclass(frozen=True)
class Rows:
    """train: the rows to learn. valid: those held out, empty if there are none. check, valid_check: what is in them."""

    train: Dataset[Any]
    valid: Dataset[Any] | tuple[()]
    check: Check
    valid_check: Check | None
    sources: tuple[Described, ...]

    @property
    def facts(self) -> dict[str, Any]:
        """What was read and what was cut, as `data check --json` says it."""
        return {**self.check.as_dict(), "valid": None if self.valid_check is None else self.valid_check.as_dict()}

    @property
    def valid_sha256(self) -> str:
        return self.valid.sha256 if isinstance(self.valid, Dataset) else ""

    def heaviest(self, config: TrainConfig) -> Load:
        """The micro-batch with the most tokens of a step over the longest rows, packed as the run packs them."""
        assert config.micro_batch_tokens is not None
        longest = np.argsort(self.train.lengths)[-config.batch_rows :]
        batches = objective_of(config).pack([self.train[int(i)] for i in longest], config.micro_batch_tokens)
        tokens = max(len(batch.input_ids) for batch in batches)
        return Load(tokens, min(tokens, int(self.train.lengths.max())), config.recompute == "full")

    def order(self, config: TrainConfig) -> Order:
        """In which order they are learned, each source by its weight."""
        return Order(self.train.counts, config.batch_rows, config.seed, [source.weight for source in self.sources])


def load_rows(
    config: TrainConfig, base: Base, on_note: Callable[[str], None], on_progress: OnProgress = silent
) -> Rows:
    """Everything that `config` names, held to its max_length. `on_note` hears what was read and cut, and what is odd.

    Raises DataError for what is broken, too long, too little, or has nothing to learn.
    """
    context = base.context - virtual_tokens(config)
    encoder = Encoder(base, config.max_length, config.truncate, config.loss_on, context)
    folder = next(p for p in config.out.absolute().parents if p.is_dir())  # for data that is larger than memory
    paths, held_out = [source.path for source in config.data], [] if config.valid is None else [config.valid]
    reading, load = Reading("read", [*paths, *held_out], on_progress), _loader(config.objective)

    def loaded(paths: Sequence[Path]) -> tuple[Dataset[Any], Tally]:
        tally = Tally(base.tokenizer)

        def on_row(row: EncodedRow) -> None:
            tally.add(row)
            reading.add()

        return load(paths, encoder, options=Options(config.data_format, folder, on_row=on_row)), tally

    train, tally = loaded(paths)
    valid, valid_tally = loaded(held_out) if held_out else ((), None)
    check, valid_check = tally.result(valid_tally), None if valid_tally is None else valid_tally.result()
    for name, found in (("data", check), ("held-out data", valid_check)):
        if found is not None:
            _require_enough(name, found, config.objective)
            on_note(f"{name}: {found.summary}")
    of_valid = () if valid_check is None else valid_check.warnings
    for warning in (*check.warnings, *(f"held-out: {warning}" for warning in of_valid)):
        on_note(warning)
    if config.alora_invocation_tokens:
        require_invoked(config, (train[i] for i in range(len(train))), "data")
        require_invoked(config, (valid[i] for i in range(len(valid))), "valid")
    described = [
        Described(source.path.name, n, source.weight, sha256_file(source.path) if source.path.is_file() else "")
        for source, n in zip(config.data, train.counts, strict=True)
    ]
    return Rows(train, valid, check, valid_check, tuple(described))


def _require_enough(name: str, check: Check, objective: str) -> None:
    check.raise_faults(f"{name}: ")
    if objective == "kto" and check.distinct < 2:
        raise DataError(
            what=f"{name}: no two rows differ, too few for the objective kto",
            why="its KL term is estimated from prompts with the answers of other rows",
            fix="give it two different rows or more",
        )


def _loader(objective: str) -> Callable[..., Dataset[Any]]:
    if objective == "sft":
        return load_examples
    return load_labelled if objective == "kto" else partial(load_pairs, objective=objective)
