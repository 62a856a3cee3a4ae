"""Data as a base model will see it, before it is trained on: what is in it, what is odd, and the first rows of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from edgelora.base.model import Base
from edgelora.data.check import Check, Tally, histogram
from edgelora.data.dataset import EncodedRow, encode_rows, objective_for
from edgelora.data.encode import Example, LossOn
from edgelora.data.fit import Encoder
from edgelora.data.formats import AUTO
from edgelora.progress import OnProgress, silent
from edgelora.training.reading import Reading


@dataclass(frozen=True)
class Ask:
    """What is asked of the data: the same as a run would ask. `preview`: how many rows are shown."""

    max_length: int | None = None
    data_format: str = AUTO
    loss_on: LossOn = "all"
    preview: int = 0


@dataclass(frozen=True)
class Part:
    """Tokens in a row that are learned, or that are not, as text; special tokens by their names."""

    text: str
    learned: bool


@dataclass(frozen=True)
class Shown:
    """A row as the model will see it: the parts of each of its examples."""

    place: str
    format: str
    examples: tuple[tuple[Part, ...], ...]


@dataclass(frozen=True)
class Checked:
    """valid: what was found in the held-out rows, if there are any. max_length: what the rows were held to."""

    check: Check
    valid: Check | None
    max_length: int
    shown: tuple[Shown, ...]

    def raise_faults(self) -> None:
        """Raise DataError for what training would refuse."""
        self.check.raise_faults()
        if self.valid is not None:
            self.valid.raise_faults("held-out data: ")

    @property
    def histogram(self) -> list[tuple[int, int, int]]:
        """(from, to, rows): how many tokens rows have."""
        return histogram(self.check.lengths)


def check_data(
    base: Base,
    paths: Sequence[Path],
    valid: Path | None = None,
    ask: Ask | None = None,
    on_progress: OnProgress = silent,
) -> Checked:
    """Read and encode every row of files and folders as training would, one at a time, and count.

    Rows longer than max_length (None: the base's context) are cut as with --truncate, to see what that would cost.
    Each file is read once, so it may be a pipe; all rows are for the objective that the first one is for. Raises
    DataError for files that are broken, and for rows of another objective; ConfigError for an unknown format.
    """
    ask = ask or Ask()
    max_length = min(ask.max_length or base.context, base.context)
    encoder = Encoder(base, max_length, truncate=True, loss_on=ask.loss_on)
    reading = Reading("check", [*paths, *([] if valid is None else [valid])], on_progress)
    objective: str | None = None

    def rows_of(path: Path) -> Iterator[EncodedRow]:
        nonlocal objective
        for row in encode_rows(path, encoder, objective, ask.data_format, is_asked=False):
            objective = objective or objective_for(row.row)
            reading.add()
            yield row

    tally, shown = Tally(base.tokenizer), list[Shown]()
    for path in paths:
        for row in rows_of(path):
            tally.add(row)
            if len(shown) < ask.preview:
                shown.append(_shown(row, base))
    held_out = None
    if valid is not None:
        held_out = Tally(base.tokenizer)
        for row in rows_of(valid):
            held_out.add(row)
    return Checked(tally.result(held_out), held_out.result() if held_out else None, max_length, tuple(shown))


def _shown(row: EncodedRow, base: Base) -> Shown:
    return Shown(str(row.place), row.format, tuple(_parts(example, base) for example in row.encoded.examples))


def _parts(example: Example, base: Base) -> tuple[Part, ...]:
    learned = example.loss_mask.tolist()
    learned[0] = False  # nothing comes before it
    parts = []
    for is_learned, run in groupby(zip(example.input_ids.tolist(), learned, strict=True), key=itemgetter(1)):
        raw = b"".join(base.tokenizer.piece(token, special=True) for token, _ in run)
        parts.append(Part(raw.decode("utf-8", "replace"), is_learned))
    return tuple(parts)
