"""Files of rows → the examples of a run: read and encoded once, row by row, whatever the size of the files.

Knows what each objective learns from, and what was left out; not the order in which rows are seen (`order.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from edgelora.data.encode import Example
from edgelora.data.fit import Encoded, Encoder
from edgelora.data.formats import AUTO, require_format
from edgelora.data.preference import Labelled, Pair
from edgelora.data.rows import Conversation, Document, Preference, Rated, Row, Tokenized, conversation_of
from edgelora.data.sources import MAX_FAULTS_SHOWN, Place, read_rows
from edgelora.data.store import IN_MEMORY_BYTES, Store
from edgelora.errors import DataError

MOST_LONG_ROWS_NAMED = 10

Item = TypeVar("Item")

# what an objective learns from: the rows, what it calls them, and the names of their formats
LEARNS_FROM: dict[str, tuple[tuple[type, ...], str]] = {
    "sft": ((Conversation, Document, Tokenized), "conversations, documents and token ids"),
    **dict.fromkeys(("dpo", "ipo", "orpo"), ((Preference,), "rows with `chosen` and `rejected`")),
    "kto": ((Rated,), "rows with `prompt`, `completion` and `label`"),
}


class EncodedRow(NamedTuple):
    """A row of a file, as it is learned."""

    place: Place
    format: str
    row: Row
    encoded: Encoded


def silent(_: EncodedRow) -> None:
    """Who does not want to see the rows go by."""


def encode_rows(
    path: Path, encoder: Encoder, objective: str | None = "sft", data_format: str = AUTO, is_asked: bool = True
) -> Iterator[EncodedRow]:
    """Each row of a file or folder, encoded, which is read once. objective: None for the one that the first row is for.

    is_asked: whether somebody asked for the objective; if not, it is that of the rows of another file. Raises DataError
    for what is broken in the file, and with up to 20 rows at once that cannot be encoded or are too long; ConfigError
    for an unknown format.
    """
    refused, long = _Refused(), _Long(encoder)
    learned_by = objective
    for place, known_as, row in read_rows(path, require_format(data_format)):
        learned_by = learned_by or objective_for(row)
        if not isinstance(row, LEARNS_FROM[learned_by][0]):
            apart = "put these rows into a file of their own" if objective is None else "leave this file to another run"
            raise _of_another(place, known_as, learned_by, None if objective is not None and is_asked else apart)
        try:
            encoded = encoder.encode(row)
        except DataError as e:
            refused.add(place, e)
            continue
        if not refused.count and not long.is_too_long(place, encoded):
            yield EncodedRow(place, known_as, row, encoded)
    refused.report()
    long.report()


def objective_for(row: Row) -> str:
    """The first objective that learns from such a row."""
    return next(name for name, (kinds, _) in LEARNS_FROM.items() if isinstance(row, kinds))


def _of_another(place: Place, known_as: str, objective: str, apart: str | None) -> DataError:
    """What is raised for a row that `objective` does not learn from. apart: how it is kept from the rows before it,
    whose objective it is; None where it was asked for."""
    name = LEARNS_FROM[objective][1]
    return DataError(
        what=f"{place}: a row of the format {known_as}",
        why=f"the first are {name}: no run learns from both" if apart else f"{objective} learns from {name}",
        fix=apart or "choose another objective (sft, dpo, ipo, orpo, kto), or other data",
    )


class Dataset(Generic[Item]):
    """The examples of a run by their numbers: `Example`s, `Pair`s or `Labelled`s, each made when it is asked for.

    counts: how many of them come from each source, in order. lengths: tokens of each, both halves of a pair. system:
    the system message that all conversations begin with, or None; single_turn: whether each has one question. Rows in
    which nothing is learned are left out; `check.Tally` counts them, and what was cut.
    """

    def __init__(self, store: Store, make: Callable[[Store, int], Item], facts: _Facts) -> None:
        self._store: Store = store
        self._make: Callable[[Store, int], Item] = make
        self.counts = tuple(facts.counts)
        self.system = next(iter(facts.systems)) if len(facts.systems) == 1 else None
        self.single_turn = facts.single_turn
        self.lengths = store.lengths.reshape(-1, facts.examples_per_item).sum(1)  # (n,)
        self.sha256 = hashlib.sha256(repr((store.sha256, self.counts, facts.labels)).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> Item:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self._make(self._store, number)

    def __iter__(self) -> Iterator[Item]:
        return (self[i] for i in range(len(self)))

    @property
    def n_tokens(self) -> int:
        return int(self.lengths.sum())


@dataclass
class _Facts:
    """What is noted while the rows go by."""

    examples_per_item: int = 1
    counts: list[int] = field(default_factory=list)
    labels: list[bool] = field(default_factory=list)
    systems: set[str | None] = field(default_factory=set)
    single_turn: bool = True

    def note(self, row: EncodedRow) -> None:
        if not row.encoded.examples:
            return
        self.counts[-1] += len(row.encoded.examples) // self.examples_per_item
        if isinstance(row.row, Rated):
            self.labels.append(row.row.desirable)
        said = conversation_of(row.row)
        first = said.messages[0] if said is not None else None
        if len(self.systems) < 2:  # two are enough to know that they are not the same
            self.systems.add(first.content if first is not None and first.role == "system" else None)
        self.single_turn &= said is not None and sum(m.role == "user" for m in said.messages) == 1


def load_examples(paths: Sequence[Path], encoder: Encoder, options: Options | None = None) -> Dataset[Example]:
    """The rows of files and folders for supervised fine-tuning. Raises what `encode_rows` raises, and OutputError."""
    options = options or Options()
    store, facts = _load(paths, encoder, "sft", _Facts(), options)
    return Dataset(store, Store.__getitem__, facts)


def load_pairs(
    paths: Sequence[Path], encoder: Encoder, objective: str = "dpo", options: Options | None = None
) -> Dataset[Pair]:
    """The same of preferences, for `dpo`, `ipo` or `orpo`."""
    store, facts = _load(paths, encoder, objective, _Facts(examples_per_item=2), options or Options())
    return Dataset(store, lambda examples, i: Pair(examples[2 * i], examples[2 * i + 1]), facts)


def load_labelled(paths: Sequence[Path], encoder: Encoder, options: Options | None = None) -> Dataset[Labelled]:
    """The same of rated answers, for `kto`."""
    store, facts = _load(paths, encoder, "kto", _Facts(), options or Options())
    return Dataset(store, lambda examples, i: Labelled(examples[i], facts.labels[i]), facts)


@dataclass(frozen=True)
class Options:
    """data_format: how rows are read. folder: where data goes that is larger than `in_memory_bytes`; None: nowhere.
    on_row sees every row as it is encoded (`check.Tally.add` is such a one)."""

    data_format: str = AUTO
    folder: Path | None = None
    in_memory_bytes: int = IN_MEMORY_BYTES
    on_row: Callable[[EncodedRow], None] = silent


def _load(
    paths: Sequence[Path], encoder: Encoder, objective: str, facts: _Facts, options: Options
) -> tuple[Store, _Facts]:
    with Store(options.folder, options.in_memory_bytes) as store:
        for path in paths:
            facts.counts.append(0)
            for row in encode_rows(path, encoder, objective, options.data_format):
                options.on_row(row)
                facts.note(row)
                for example in row.encoded.examples:
                    store.append(example)
    return store, facts


class _Refused:
    """Rows that cannot be encoded, reported at once."""

    def __init__(self) -> None:
        self.count, self._faults = 0, list[tuple[Place, DataError]]()

    def add(self, place: Place, error: DataError) -> None:
        self.count += 1
        self._faults.append((place, error))
        if self.count == MAX_FAULTS_SHOWN:
            self.report()

    def report(self) -> None:
        if self._faults:
            first = self._faults[0][1]
            lines = [f"{place}: {e.what}" for place, e in self._faults]
            more = " or more, where it was given up," if self.count == MAX_FAULTS_SHOWN else ""
            several = f"{self.count} rows{more} cannot be learned\n  " if self.count > 1 else ""
            raise DataError(several + "\n  ".join(lines), first.why, first.fix)


class _Long:
    """Rows that are longer than is allowed and may not be cut."""

    def __init__(self, encoder: Encoder) -> None:
        self._limit, self._context = None if encoder.truncate else encoder.max_length, encoder.context
        self._count, self._longest, self._named = 0, 0, list[str]()

    def is_too_long(self, place: Place, encoded: Encoded) -> bool:
        longest = max(map(len, encoded.examples), default=0)
        if self._limit is None or longest <= self._limit:
            return False
        self._count, self._longest = self._count + 1, max(self._longest, longest)
        if len(self._named) < MOST_LONG_ROWS_NAMED:
            self._named.append(f"{place} ({longest})")
        return True

    def report(self) -> None:
        if self._count:
            more = f" and {self._count - len(self._named)} more" if self._count > len(self._named) else ""
            seen_whole = self._context is None or self._longest <= self._context
            why = "cutting them would teach answers that break off"
            raise DataError(
                what=f"{self._count} rows are longer than {self._limit} tokens: {', '.join(self._named)}{more}",
                why=why if seen_whole else f"the base sees no more than {self._context} tokens, and {why}",
                fix=f"pass {f'--max-length {self._longest} or ' * seen_whole}--truncate, or shorten these rows",
            )
