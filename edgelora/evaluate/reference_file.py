"""A reference's predictions on a text, kept in a file: in llama-perplexity's own format, or as its likeliest tokens.

`*.kld`: what `llama-perplexity --kl-divergence-base` writes and reads, 2 bytes for every token of the vocabulary at
every position. Log-probabilities lie on 65,536 steps of at most 16 nats below the likeliest; what is less likely still
is put at its end (so such a target's −log p is too small, and that of the whole text by some thousandths).

Any other name: the `top` likeliest tokens of each position in float32, the target's −log p, and the mass of all others
in one number, 8 bytes a token. KL from it is never above the true one; what is lost lies in the rest.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from edgelora.errors import ConfigError, FileFormatError, OutputError
from edgelora.evaluate.divergence import ROWS, Candidate, Compared, Reference
from edgelora.evaluate.perplexity import Window

KLD, COMPACT = b"_logits_", b"edgelora-reference-1\n"
DEEPEST = 16.0  # nats below the likeliest token, in a .kld file
STEPS = 65535
HEADER_BYTES = 1024  # of a compact file, magic and JSON, filled up with blanks
MAX_TOKENS = 1 << 28  # of a text; a header that claims more is broken


@dataclass(frozen=True)
class About:
    """What a reference file was made of."""

    context: int
    n_vocab: int
    n_windows: int
    top: int | None = None
    """Likeliest tokens kept of each position; None: all."""
    model_sha256: str = ""

    @property
    def scored(self) -> int:
        """Positions of a window that are scored."""
        return self.context - 1 - self.context // 2


class Layout(Protocol):
    """How a window's predictions are written and read."""

    about: About

    @property
    def record_bytes(self) -> int:
        """Of one window."""
        ...

    def header(self, tokens: np.ndarray) -> bytes:
        """What the file begins with; tokens: int32 (windows, context)."""
        ...

    def rows(self, candidate: Candidate) -> bytes:
        """The record of a window, of the logits of its scored positions."""
        ...

    def read(self, record: bytes) -> Reference:
        """A record as what a candidate is compared with."""
        ...


class Whole:
    """llama-perplexity's format."""

    def __init__(self, about: About) -> None:
        self.about, self._row = about, 2 * ((about.n_vocab + 1) // 2) + 4

    @property
    def record_bytes(self) -> int:
        return self.about.scored * self._row * 2

    def header(self, tokens: np.ndarray) -> bytes:
        sizes = np.array([self.about.context, self.about.n_vocab, self.about.n_windows], "<i4")
        return KLD + sizes.tobytes() + tokens.astype("<i4").tobytes()

    def rows(self, candidate: Candidate) -> bytes:
        logits, top = candidate.logits, candidate.logits.max(-1, keepdims=True)
        rows = np.zeros((len(logits), self._row), "<u2")
        least = np.maximum(logits.min(-1, keepdims=True), top - np.float32(DEEPEST))
        scale = (top - least) / np.float32(STEPS)
        flat = scale == 0  # all tokens equally likely
        steps = np.rint((logits - least) * (np.float32(1) / np.where(flat, np.float32(1), scale)))
        rows[:, 4 : 4 + self.about.n_vocab] = np.clip(steps, 0, STEPS).astype(np.uint16)
        rows[:, :4] = np.concatenate([scale, least - candidate.log_total], -1).astype("<f4").view("<u2")
        return rows.tobytes()

    def read(self, record: bytes) -> Reference:
        return _Steps(np.frombuffer(record, "<u2").reshape(self.about.scored, self._row), self.about.n_vocab)


class _Steps:
    """Rows of a .kld file; compared as llama-perplexity does."""

    def __init__(self, rows: np.ndarray, n_vocab: int) -> None:
        self._rows, self._n_vocab = rows, n_vocab

    def compare(self, first: int, candidate: Candidate) -> Compared:
        rows = self._rows[first : first + len(candidate.targets)]
        numbers = np.ascontiguousarray(rows[:, :4]).view("<f4")
        log_p = numbers[:, :1] * rows[:, 4 : 4 + self._n_vocab].astype(np.float32) + numbers[:, 1:]
        terms = np.exp(log_p) * (log_p - candidate.log_p)
        kl = np.where(log_p > -DEEPEST, terms, np.float32(0)).sum(-1, dtype=np.float64)
        return Compared(candidate.nll, -candidate.of_targets(log_p)[:, 0], kl, candidate.top == log_p.argmax(-1))


class Likeliest:
    """The likeliest tokens of each position, the target's −log p, and the mass of the rest."""

    def __init__(self, about: About) -> None:
        assert about.top is not None
        self.about, self._top = about, about.top

    @property
    def record_bytes(self) -> int:
        return self.about.scored * 8 * (self._top + 1)

    def header(self, tokens: np.ndarray) -> bytes:
        said = COMPACT + json.dumps(asdict(self.about)).encode()
        return said.ljust(HEADER_BYTES) + tokens.astype("<i4").tobytes()

    def rows(self, candidate: Candidate) -> bytes:
        log_p = candidate.log_p
        some = np.argpartition(log_p, -self._top, axis=-1)[:, -self._top :]
        order = np.argsort(-np.take_along_axis(log_p, some, -1), axis=-1, kind="stable")
        ids = np.take_along_axis(some, order, -1)
        kept = np.take_along_axis(log_p, ids, -1)
        rest = np.maximum(1 - np.exp(kept.astype(np.float64)).sum(-1), 0)
        cells = [ids.astype("<i4").view("<f4"), kept, candidate.nll[:, None], rest[:, None]]
        return np.concatenate([part.astype("<f4", copy=False) for part in cells], -1).tobytes()

    def read(self, record: bytes) -> Reference:
        cells = np.frombuffer(record, "<f4").reshape(self.about.scored, 2 * self._top + 2)
        return _Kept(cells, self._top)


class _Kept:
    """KL over the tokens kept, and over all others as if they were one: never above the true (log-sum inequality)."""

    def __init__(self, cells: np.ndarray, top: int) -> None:
        self._ids = np.ascontiguousarray(cells[:, :top]).view("<i4")
        self._log_p, self._nll, self._rest = cells[:, top : 2 * top], cells[:, -2], cells[:, -1]

    def compare(self, first: int, candidate: Candidate) -> Compared:
        part = slice(first, first + len(candidate.targets))
        ids, log_p, rest = self._ids[part], self._log_p[part].astype(np.float64), self._rest[part].astype(np.float64)
        other = np.take_along_axis(candidate.log_p, ids, -1).astype(np.float64)
        # rounded as the reference's was, so that a model's KL to itself is exactly 0
        others_rest = np.maximum(1 - np.exp(other).sum(-1), 0).astype(np.float32).astype(np.float64)
        least = np.finfo(np.float32).tiny
        beyond = rest * np.log(np.maximum(rest, least) / np.maximum(others_rest, least))
        kl = (np.exp(log_p) * (log_p - other)).sum(-1) + np.where(rest > 0, beyond, 0.0)
        return Compared(candidate.nll, self._nll[part], kl, candidate.top == ids[:, 0])


class ReferenceFile:
    """A finished reference file, read window by window. Raises FileFormatError if it is none, or not whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _opened(path) as file:
            self.layout, start = _header(path, file)
            about = self.layout.about
            tokens = np.frombuffer(file.read(4 * about.n_windows * about.context), "<i4")
        self._start = start + 4 * about.n_windows * about.context
        whole = self._start + about.n_windows * self.layout.record_bytes
        if path.stat().st_size != whole:
            raise FileFormatError(
                what=f"{path}: it has {path.stat().st_size:,} bytes, a whole one {whole:,}",
                why="it was not written to its end, or is damaged",
                fix="write it again with `edgelora perplexity REFERENCE --save-reference`",
            )
        self.windows = [
            Window(ids.astype(np.int64), about.context // 2 + 1) for ids in tokens.reshape(-1, about.context)
        ]

    @property
    def about(self) -> About:
        return self.layout.about

    def window(self, number: int) -> Reference:
        """The predictions of a window, counted from 0."""
        with _opened(self.path) as file:
            file.seek(self._start + number * self.layout.record_bytes)
            return self.layout.read(file.read(self.layout.record_bytes))


class ReferenceWriter:
    """Writes a reference file window by window beside its name; stopped, it goes on at the next whole window."""

    def __init__(self, path: Path, about: About, windows: Sequence[Window]) -> None:
        self.layout: Layout = Whole(about) if about.top is None else Likeliest(about)
        self._path, self._part = path, path.with_name(f"{path.name}.part")
        header = self.layout.header(np.stack([window.ids for window in windows]))
        self.done = 0
        if self._part.exists() and self._part.read_bytes()[: len(header)] == header:
            self.done = (self._part.stat().st_size - len(header)) // self.layout.record_bytes
            self._file: BinaryIO = self._part.open("r+b")
            self._file.truncate(len(header) + self.done * self.layout.record_bytes)
            self._file.seek(0, os.SEEK_END)
        else:
            self._file = self._part.open("wb")
            self._file.write(header)

    def add(self, logits: np.ndarray, targets: np.ndarray) -> None:
        """float32 (n, V) of the next window."""
        for first in range(0, len(targets), ROWS):
            part = slice(first, first + ROWS)
            self._file.write(self.layout.rows(Candidate(logits[part], targets[part])))

    def close(self, *, whole: bool) -> None:
        """Give the file its name if it is `whole`; else what is there stays for the next time."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if whole:
            self._part.replace(self._path)


def about_file(path: Path, context: int, n_vocab: int, n_windows: int, top: int, model_sha256: str) -> About:
    """What a file of this name will hold: `.kld` everything, any other the `top` likeliest tokens."""
    if path.suffix == ".kld":
        return About(context, n_vocab, n_windows, None, "")
    if not 1 <= top <= n_vocab:
        raise ConfigError(
            what=f"--top {top}: this vocabulary has {n_vocab:,} tokens",
            why="it is how many of them are kept at every position",
            fix="pass a number such as 256",
        )
    return About(context, n_vocab, n_windows, top, model_sha256)


def is_reference(path: Path) -> bool:
    """Whether the file begins as a reference file does."""
    with _opened(path) as file:
        begin = file.read(len(COMPACT))
    return begin.startswith(KLD) or begin == COMPACT


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as e:
        raise OutputError(what=f"{path} cannot be read", why=str(e.strerror), fix="check the path") from e


def _header(path: Path, file: BinaryIO) -> tuple[Layout, int]:
    begin = file.read(len(COMPACT))
    try:
        if begin.startswith(KLD):
            file.seek(len(KLD))
            context, n_vocab, n_windows = (int(n) for n in np.frombuffer(file.read(12), "<i4"))
            about = About(context, n_vocab, n_windows)
            start = len(KLD) + 12
        elif begin == COMPACT:
            about = About(**json.loads(file.read(HEADER_BYTES - len(COMPACT))))
            start = HEADER_BYTES
        else:
            raise ValueError("it does not begin as one does")
        _require_sane(about)
    except (ValueError, TypeError) as e:
        raise FileFormatError(
            what=f"{path}: this is no reference file",
            why=f"llama-perplexity's or edgelora's was expected: {e}",
            fix="pass a .gguf, or what `edgelora perplexity REFERENCE --save-reference FILE` wrote",
        ) from e
    file.seek(start)
    return (Whole(about) if about.top is None else Likeliest(about)), start


def _require_sane(about: About) -> None:
    sizes = (about.context, about.n_vocab, about.n_windows, 1 if about.top is None else about.top)
    if any(type(size) is not int or size < 1 for size in sizes) or math.prod(sizes[0::2]) > MAX_TOKENS:
        raise ValueError("its sizes make no sense")
    if about.top is not None and about.top > about.n_vocab:
        raise ValueError("it keeps more tokens than there are")
