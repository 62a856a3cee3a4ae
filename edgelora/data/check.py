"""What is odd about data before anything is trained on it: counted as the rows go by, and judged at the end.

Faults stop a run, warnings do not. Knows neither files nor the model: it sees rows as they are encoded.
"""

from __future__ import annotations

import bisect
import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from edgelora.data.dataset import EncodedRow
from edgelora.data.encode import Example
from edgelora.data.rows import Document, Preference, Row, conversation_of
from edgelora.data.sources import Place
from edgelora.data.tokenizer import Tokenizer
from edgelora.errors import DataError
from edgelora.words import count

MOST_PLACES_NAMED = 5


@dataclass(frozen=True)
class Check:
    """What was found in the rows of a file or of several.

    formats: rows of each. tokens: before anything was cut. lengths (n_rows,): tokens of each row, both answers of a
    pair counted. cut, lost_tokens, lost_turns, lost_ends: rows that were (or would be) shortened to max_length, and
    what they lost: tokens, whole answers, ends of answers. left_out: rows in which nothing is learned. duplicates:
    rows that are the same as an earlier one; overlap: those that are held out too. special, empty: rows with the text
    of a special token, or with an empty answer. one_token: answers of one token, the end of the turn not counted.
    """

    formats: dict[str, int]
    rows: int
    tokens: int
    loss_tokens: int
    lengths: np.ndarray
    cut: int
    lost_tokens: int
    lost_turns: int
    lost_ends: int
    left_out: int
    duplicates: int
    overlap: int
    special: int
    empty: int
    one_token: int
    named: dict[str, tuple[str, ...]]
    """The first places of rows that are duplicates, overlap, special, empty or left_out."""

    @property
    def loss_share(self) -> float:
        """The share of all tokens that is learned."""
        return self.loss_tokens / max(1, self.tokens - self.lost_tokens)

    @property
    def distinct(self) -> int:
        """Rows that are learned, the same ones counted once."""
        return self.rows - self.left_out - self.duplicates

    @property
    def kinds(self) -> str:
        """`chat (924), text (1)`: how many rows there are of each format."""
        return ", ".join(f"{name} ({n:,})" for name, n in self.formats.items())

    @property
    def summary(self) -> str:
        """`chat (924), 57,808 tokens, 31.6% of them learned`, and what was cut, in one line."""
        said = f"{self.kinds}, {self.tokens - self.lost_tokens:,} tokens, {self.loss_share:.1%} of them learned"
        if not self.cut:
            return said
        lost = f"{count(self.lost_tokens, 'token')}, {count(self.lost_turns, 'whole answer')}"
        return f"{said}; cut: {count(self.cut, 'row')}, by {lost} and the end of {self.lost_ends:,}"

    @property
    def faults(self) -> tuple[str, ...]:
        """What makes training pointless."""
        if self.rows and self.left_out == self.rows:
            return ("no row has a token to learn: all labels are masked",)
        return ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is probably not meant, with the first places of it."""
        found = {
            "left_out": "with nothing to learn, left out",
            "duplicates": "the same as an earlier one",
            "overlap": "that the held-out data have too: their loss is then no measure",
            "special": "with the text of a special token in what is said: it stays text, for the template writes those",
            "empty": "with an empty answer among the turns",
        }
        said = [self._warning(name, what) for name, what in found.items() if getattr(self, name)]
        if self.lost_turns:
            said.append(f"{count(self.lost_turns, 'answer')} left out whole: the rows are longer than max_length")
        if self.lost_ends:
            said.append(f"{count(self.lost_ends, 'answer')} cut before the end: the model learns to break off there")
        return tuple(said)

    def raise_faults(self, of: str = "") -> None:
        """Raise DataError if there is one. of: the words that stand before it."""
        if self.faults:
            raise DataError(
                what=of + "; ".join(self.faults),
                why="message weights, labels or max_length leave nothing to learn, so no step would change anything",
                fix="see what is learned with `edgelora data check FILE --base BASE --preview 3`",
            )

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the lengths as a histogram."""
        fields = asdict(self) | {"lengths": histogram(self.lengths), "loss_share": self.loss_share}
        return fields | {"faults": self.faults, "warnings": self.warnings}

    def _warning(self, name: str, what: str) -> str:
        n = getattr(self, name)
        places = ", ".join(self.named[name]) + (" …" if n > len(self.named[name]) else "")
        return f"{count(n, 'row')} {what} ({places})"


class Tally:
    """Counts rows as they are encoded: `add` each, then `result`. 24 bytes a row are kept."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._formats: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._named: dict[str, list[Place]] = {}
        self._lengths = array("q")
        self._digests, self._numbers = array("Q"), array("q")  # of rows that are not left out
        self._files: list[tuple[int, Path]] = []  # from which of those rows on they come from this file

    def add(self, row: EncodedRow) -> None:
        self._formats[row.format] += 1
        self._lengths.append(row.encoded.tokens)
        self._counts["loss_tokens"] += sum(e.n_loss_tokens for e in row.encoded.examples)
        if (cut := row.encoded.cut) is not None:
            self._counts.update(cut=1, lost_tokens=cut.tokens - cut.kept, lost_turns=cut.turns, lost_ends=cut.ends)
        if row.encoded.examples:
            self._remember(row)
        else:
            self._note("left_out", row.place)
        texts, answers = _said(row.row)
        if any(self._tokenizer.control_pattern.search(text) for text in texts):
            self._note("special", row.place)
        if any(not answer.strip() for answer in answers):
            self._note("empty", row.place)
        if conversation_of(row.row) is not None:
            self._counts["one_token"] += sum(self._short_answers(e) for e in row.encoded.examples)

    def result(self, held_out: Tally | None = None) -> Check:
        """What was found; the overlap is with the rows of `held_out`."""
        digests = np.array(self._digests, np.uint64)
        first = np.unique(digests, return_index=True)[1]
        again = np.delete(np.arange(len(digests)), first)
        known = np.array([] if held_out is None else held_out._digests, np.uint64)
        places = {"duplicates": again, "overlap": np.flatnonzero(np.isin(digests, known))}
        named = self._named | {n: [self._place(i) for i in at[:MOST_PLACES_NAMED]] for n, at in places.items()}
        counts = ("loss_tokens", "cut", "lost_tokens", "lost_turns", "lost_ends", "left_out", "duplicates", "overlap",
                  "special", "empty", "one_token")  # fmt: skip
        lengths, of = np.array(self._lengths, np.int64), self._counts | {n: len(at) for n, at in places.items()}
        return Check(
            formats=dict(self._formats),
            rows=len(lengths),
            tokens=int(lengths.sum()),
            lengths=lengths,
            named={name: tuple(map(str, at)) for name, at in named.items()},
            **{name: of.get(name, 0) for name in counts},
        )

    def _note(self, name: str, place: Place) -> None:
        self._counts[name] += 1
        places = self._named.setdefault(name, [])
        if len(places) < MOST_PLACES_NAMED:
            places.append(place)

    def _remember(self, row: EncodedRow) -> None:
        if not self._files or self._files[-1][1] != row.place.path:
            self._files.append((len(self._digests), row.place.path))
        self._digests.append(_digest(row.encoded.examples))
        self._numbers.append(row.place.number)

    def _place(self, index: int) -> Place:
        file = bisect.bisect_right(self._files, index, key=lambda one: one[0]) - 1
        return Place(self._files[file][1], self._numbers[index])

    def _short_answers(self, example: Example) -> int:
        """Runs of learned tokens that are one token, the end of the turn not counted."""
        said = example.loss_mask.copy()
        for ending in self._tokenizer.eog_ids:
            said &= example.input_ids != ending
        edges = np.flatnonzero(np.diff(np.concatenate([[0], said.astype(np.int8), [0]])))
        return int(np.count_nonzero(edges[1::2] - edges[::2] == 1))


def histogram(lengths: np.ndarray, bins: int = 12) -> list[tuple[int, int, int]]:
    """(from, to, rows) of at most `bins` ranges over the lengths (n,), each `from` ≤ length ≤ `to`.

    Each range is longer than the one before it by the same factor: rows are short, and a few are very long.
    """
    if not len(lengths):
        return []
    edges = np.unique(np.rint(np.geomspace(lengths.min(), lengths.max() + 1, bins + 1)).astype(np.int64))
    counts = np.histogram(lengths, edges)[0]
    return [(low, high - 1, n) for (low, high), n in zip(pairwise(edges.tolist()), counts.tolist(), strict=True)]


def _digest(examples: Iterable[Example]) -> int:
    """64 bits: two of 10 million different rows are taken for the same with a probability of 3 in a million."""
    digest = hashlib.blake2b(digest_size=8)
    for example in examples:
        digest.update(len(example).to_bytes(8, "little") + example.input_ids.tobytes() + example.loss_mask.tobytes())
    return int.from_bytes(digest.digest(), "little")


def _said(row: Row) -> tuple[list[str], list[str]]:
    """Every text in a row, and those that the assistant says without calling a tool."""
    if isinstance(row, Document):
        return [row.text], []
    if (conversation := conversation_of(row)) is None:
        return [], []
    messages = [*conversation.messages, *(row.rejected.messages[-1:] if isinstance(row, Preference) else ())]
    texts = [m.content for m in messages if m.content is not None]
    return texts, [m.content or "" for m in messages if m.role == "assistant" and not m.tool_calls]
