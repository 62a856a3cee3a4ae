"""Which tokens an importance matrix is computed on: the user's own rows as the model sees them, and a general text.

A row is a sequence of its own, cut where it is longer than a window; the text is cut into windows as llama-imatrix
does, so that on a text alone both see the same tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from edgelora.data.encode import encode_conversation, encode_document, encode_tokenized
from edgelora.data.fit import Speech
from edgelora.data.rows import Document, Row, Tokenized, conversation_of
from edgelora.data.sources import cannot_read, read_rows
from edgelora.data.tokenizer import Tokenizer
from edgelora.errors import ConfigError, DataError

MOST_ROWS = 16_384  # drawn from a larger file
CHARACTERS_PER_TOKEN = 4  # a first guess at how much of a text is needed

Item = TypeVar("Item")


@dataclass(frozen=True)
class Mix:
    """data: a file or folder of rows, text: a general one in UTF-8; one of them may be None. share: how many of all
    tokens are the text's, if both are there. At most `windows` of `window` tokens each."""

    data: Path | None
    text: Path | None = None
    share: float = 0.5
    windows: int = 100
    window: int = 512


@dataclass(frozen=True)
class Calibration:
    """Sequences of ids (n,), n at most a window, each to be evaluated by itself."""

    task: tuple[np.ndarray, ...]
    general: tuple[np.ndarray, ...]

    @property
    def task_tokens(self) -> int:
        return sum(map(len, self.task))

    @property
    def general_tokens(self) -> int:
        return sum(map(len, self.general))

    @property
    def sequences(self) -> tuple[np.ndarray, ...]:
        """Those of the task, then the general ones."""
        return self.task + self.general


def calibrate(mix: Mix, speech: Speech) -> Calibration:
    """The tokens of `mix` as `speech` renders and tokenizes them. The rarer source decides how much of both is taken.

    Raises ConfigError for a mix that cannot be; DataError for rows or a text that are broken, empty or too short;
    BaseModelError where rows are conversations and the base has no chat template.
    """
    _require(mix)
    room = mix.windows * mix.window
    if mix.data is None or mix.text is None:
        task = task_sequences(mix.data, speech, mix.window, room) if mix.data else []
        general = general_sequences(mix.text, speech.tokenizer, mix.window, room) if mix.text else []
        return Calibration(tuple(task), tuple(general))
    ratio = mix.share / (1 - mix.share)  # tokens of the text for one of the task
    task = task_sequences(mix.data, speech, mix.window, round(room * (1 - mix.share)))
    wanted = max(1, round(sum(map(len, task)) * ratio))
    general = general_sequences(mix.text, speech.tokenizer, mix.window, wanted)
    return Calibration(tuple(_first(task, max(1, round(sum(map(len, general)) / ratio)))), tuple(general))


def _require(mix: Mix) -> None:
    if mix.data is None and mix.text is None:
        raise ConfigError("an importance matrix of nothing", "neither rows nor a text were named", "pass --data ROWS")
    if not 0 < mix.share < 1:
        raise ConfigError(
            what=f"--mix {mix.share:g}: no share of two texts",
            why="it is how many of all tokens are the general text's: more than 0, less than 1",
            fix="pass one such as 0.5, or leave --text or --data out",
        )
    if mix.windows < 1 or mix.window < 2:
        raise ConfigError(
            what=f"{mix.windows} chunks of {mix.window} tokens",
            why="nothing would be computed",
            fix="pass --chunks 100 --context 512",
        )


def task_sequences(path: Path, speech: Speech, window: int, room: int) -> list[np.ndarray]:
    """All tokens of rows as the model sees them, up to `room` tokens of rows drawn evenly from the whole file."""
    drawn = _sample((row for _, _, row in read_rows(path)), MOST_ROWS)
    pieces: list[np.ndarray] = []
    taken = 0
    for row in drawn:
        if taken >= room:
            break
        ids = _ids(row, speech)
        pieces += [ids[i : i + window] for i in range(0, len(ids), window)]
        taken += len(ids)
    if not taken:
        raise DataError(
            what=f"{path}: no tokens in its rows",
            why="an importance matrix is computed on what the model reads and says",
            fix="pass rows with text in them",
        )
    return _first(pieces, room)


def _ids(row: Row, speech: Speech) -> np.ndarray:
    if isinstance(row, Document):
        return encode_document(row, speech.tokenizer).input_ids
    if isinstance(row, Tokenized):
        return encode_tokenized(row, speech.tokenizer).input_ids
    conversation = conversation_of(row)
    assert conversation is not None
    return encode_conversation(conversation, speech.tokenizer, speech.template).input_ids


def general_sequences(path: Path, tokenizer: Tokenizer, window: int, wanted: int) -> list[np.ndarray]:
    """The first `wanted` tokens of a text in windows, as llama-imatrix cuts them: BOS, where texts of the model have
    one, in place of the first token of each, one newline at the end of the text left out."""
    text = _read(path).removesuffix("\n")
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    ids: list[int] = []
    characters = CHARACTERS_PER_TOKEN * (wanted + window)
    while len(ids) < wanted + window and len(ids := tokenizer.encode(text[:characters]).ids) < wanted + window:
        if characters >= len(text):
            break
        characters *= 2
    whole = np.array(ids if bos is None else [bos, *ids], np.int64)
    if len(whole) < window:
        raise DataError(
            what=f"{path}: {len(whole)} tokens, less than one window of {window}",
            why="the model would see less than it does in use",
            fix=f"pass a longer text, or --context {max(2, len(whole))}",
        )
    whole = whole[: len(whole) // window * window]
    pieces = [whole[i : i + window].copy() for i in range(0, len(whole), window)]
    if bos is not None:
        for piece in pieces:
            piece[0] = bos
    return _first(pieces, wanted)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # line ends as they are
    except OSError as e:
        raise cannot_read(path, e) from e
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: not a text file in UTF-8", str(e.reason), "convert the file to UTF-8") from e


def _first(pieces: Sequence[np.ndarray], tokens: int) -> list[np.ndarray]:
    """The pieces up to this many tokens, the last of them cut."""
    taken = []
    for piece in pieces:
        if tokens <= 0:
            break
        taken.append(piece[:tokens])
        tokens -= len(taken[-1])
    return taken


def _sample(rows: Iterable[Item], most: int) -> Iterator[Item]:
    """All of them, or `most` of them drawn evenly (Vitter's algorithm R), in an order of chance; the same each time."""
    draw, kept = random.Random(0), list[Item]()
    for number, row in enumerate(rows):
        if number < most:
            kept.append(row)
        elif (place := draw.randrange(number + 1)) < most:
            kept[place] = row
    draw.shuffle(kept)
    return iter(kept)
