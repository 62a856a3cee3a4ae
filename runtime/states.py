"""What is kept of what was computed, and whom it may answer for: every state is named by all that went into it.

A prompt is evaluated in parts that end at fixed multiples of a chunk. Each such cut has a digest of (base, adapters and
scales, tokens) from the beginning up to there; two sequences hold the same keys and values up to a cut exactly if their
digests there are equal. What lies behind the last cut was computed in other shapes and is never reused.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

Key = tuple[tuple[str, float], ...]
"""The active adapters: (digest, scale), sorted by digest; () is the base alone."""

NO_TOKEN = -1
"""Stands in a prompt for each position that a soft prompt or a prefix takes."""

Chain = tuple[bytes, ...]
"""The digests of a sequence at its cuts: after one chunk, after two …"""


@dataclass(frozen=True)
class Part:
    """Tokens of a prompt, or positions before it, that are evaluated in one decode under one set of adapters."""

    first: int
    tokens: tuple[int, ...]
    key: Key

    @property
    def last(self) -> int:
        """One behind its last position."""
        return self.first + len(self.tokens)

    @property
    def is_head(self) -> bool:
        """Whether it is of what stands before a prompt: all its tokens are NO_TOKEN."""
        return self.tokens[0] == NO_TOKEN


def cut(prompt: Sequence[int], phases: Sequence[tuple[int, Key]], chunk: int) -> list[Part]:
    """`prompt` in parts that end at multiples of `chunk`, where a phase begins, and at its end.

    phases: (position, adapters) that are active from there on; the first at 0. Where its first token stands, if
    something stands before it, a part ends too.
    """
    starts = {*(start for start, _ in phases), next(i for i, token in enumerate(prompt) if token != NO_TOKEN)}
    ends = sorted({*range(chunk, len(prompt), chunk), *(starts - {0}), len(prompt)})
    parts, first = [], 0
    for end in ends:
        key = next(key for start, key in reversed(phases) if start <= first)
        parts.append(Part(first, tuple(prompt[first:end]), key))
        first = end
    return parts


def chain_of(parts: Sequence[Part], chunk: int, root: bytes) -> Chain:
    """The digests at the cuts inside a prompt. The end of the prompt is none: its last token must be evaluated."""
    digests, running = [], hashlib.blake2b(root, digest_size=32)
    for part in parts[:-1]:
        running.update(named(part.key))
        running.update(np.asarray(part.tokens, "<i4").tobytes())
        if part.last % chunk == 0:
            digests.append(running.digest())
    return tuple(digests)


def named(key: Key) -> bytes:
    """A key as bytes that no other key has."""
    return struct.pack("<i", len(key)) + b"".join(digest.encode() + struct.pack("<f", scale) for digest, scale in key)


def common(a: Chain, b: Chain) -> int:
    """How many chunks two sequences begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass
class Slot:
    """A sequence of a context: what it holds up to its last cut, and whether somebody works in it."""

    sequence: int
    chain: Chain = ()
    busy: bool = False
    key: Key = ()
    """The adapters of the answer that works in it."""
    used: int = 0
    """When it was last taken: a count of turns."""


@dataclass(frozen=True)
class Snapshot:
    """The keys and values of a sequence up to its last cut, as llama.cpp hands them out."""

    chain: Chain
    state: np.ndarray = field(repr=False)


class Archive(Protocol):
    """Where snapshots go that RAM has no room for."""

    def longest(self, chain: Chain) -> tuple[int, Snapshot] | None:
        """(how many chunks it shares with `chain`, the snapshot) that shares the most; None if none does."""
        ...

    def shares(self, chain: Chain) -> int:
        """How many chunks the best shares with `chain`, without reading it."""
        ...

    def keep(self, snapshot: Snapshot) -> None:
        """Take one, unless it is there or has no room."""
        ...


class Snapshots:
    """States in RAM under a budget in bytes; the least recently used go to the archive, or are dropped."""

    def __init__(self, budget_bytes: int, archive: Archive | None = None) -> None:
        self._budget, self.archive = budget_bytes, archive
        self._by_end = OrderedDict[bytes, Snapshot]()
        self._at: dict[bytes, bytes] = {}  # the digest of any cut → the end of a snapshot that goes through it

    @property
    def n_bytes(self) -> int:
        return sum(snapshot.state.nbytes for snapshot in self._by_end.values())

    def __len__(self) -> int:
        return len(self._by_end)

    def longest(self, chain: Chain) -> tuple[int, Snapshot] | None:
        """(how many chunks it shares with `chain`, the snapshot) that shares the most; None if none shares any."""
        n, end = next(((n, end) for n in range(len(chain), 0, -1) if (end := self._at.get(chain[n - 1]))), (0, None))
        if self.archive is not None and self.archive.shares(chain) > n:
            return self.archive.longest(chain) or self._here(n, end)
        return self._here(n, end)

    def _here(self, n: int, end: bytes | None) -> tuple[int, Snapshot] | None:
        if end is None:
            return None
        self._by_end.move_to_end(end)
        return n, self._by_end[end]

    def wants(self, chain: Chain, n_bytes: int) -> bool:
        """Whether a state of this size is worth taking: it fits, and no snapshot holds it already."""
        return bool(chain) and n_bytes <= self._budget and chain[-1] not in self._at

    def keep(self, snapshot: Snapshot) -> None:
        """Keep one, in place of those that it goes on from."""
        for digest in snapshot.chain:
            if digest in self._by_end:
                self._drop(digest)
        self._by_end[snapshot.chain[-1]] = snapshot
        self._at.update(dict.fromkeys(snapshot.chain, snapshot.chain[-1]))
        while self.n_bytes > self._budget:
            self._to_archive(self._drop(next(iter(self._by_end))))

    def close(self) -> None:
        """Hand all that is kept to the archive."""
        for snapshot in self._by_end.values():
            self._to_archive(snapshot)
        self._by_end.clear()
        self._at.clear()

    def _to_archive(self, snapshot: Snapshot) -> None:
        if self.archive is not None:
            self.archive.keep(snapshot)

    def _drop(self, end: bytes) -> Snapshot:
        gone = self._by_end.pop(end)
        for digest in gone.chain:
            if self._at.get(digest) == end:
                del self._at[digest]
        for other in self._by_end.values():  # a cut may be on the way of another one too
            self._at.update({digest: other.chain[-1] for digest in other.chain if digest not in self._at})
        return gone
