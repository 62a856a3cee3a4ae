"""Texts and conversations → ids as training sees them, and the same ids held against llama.cpp's own tokenizer."""

from __future__ import annotations

import codecs
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import gguf

from edgelora.base.model import Base, open_base
from edgelora.child import run_in_child
from edgelora.data.conversation import Conversation, read_conversations
from edgelora.data.encode import cut, encode_turns, turn_weights
from edgelora.data.sources import cannot_read
from edgelora.data.template import ChatTemplate
from edgelora.data.tokenizer import Tokenizer
from edgelora.data.turns import Turns
from edgelora.errors import CertificateError, DataError
from edgelora.progress import OnProgress, Pace, Progress, silent

if TYPE_CHECKING:
    from runtime.binding import Model

LARGEST_TEXT = 8 << 20  # a text is tokenized whole, as llama.cpp does it: in 15 seconds and 1.3 GB


@dataclass(frozen=True)
class Tokenized:
    """A text and its ids. Of a conversation: the rendered prompt, its ids with BOS, and which of them have loss."""

    text: str
    ids: list[int]
    learned: list[bool] | None = None
    parts: tuple[int | str, ...] = ()
    """Of a conversation: the template's own special tokens, and each text between two of them (see `encode.cut`)."""


@dataclass(frozen=True, slots=True)
class Token:
    """`piece` are the token's bytes, those of a special token its text; `special`: it was not read as plain text."""

    id: int
    piece: bytes
    special: bool
    learned: bool


@dataclass(frozen=True)
class Difference:
    """The first id that llama.cpp gives otherwise, counted from 0. None where one of the two has come to its end."""

    position: int
    ours: int | None
    theirs: int | None


def read_text(path: Path) -> str:
    """The text of a file, byte for byte, or of standard input for `-`. Raises DataError if it is none."""
    try:
        if str(path) == "-":
            raw = sys.stdin.buffer.read(LARGEST_TEXT + 1)
        else:
            with path.open("rb") as f:
                raw = f.read(LARGEST_TEXT + 1)
    except OSError as e:
        raise cannot_read(path, e) from e
    text = _decoded(raw, str(path), "convert the file to UTF-8", whole=len(raw) <= LARGEST_TEXT)
    if len(raw) <= LARGEST_TEXT:
        return text
    raise DataError(
        what=f"{path}: a text of more than {LARGEST_TEXT >> 20} MB",
        why="a text is tokenized whole, in memory",
        fix=f"pass a part of it: head -n 10000 {path} | edgelora tokenize … --file -",
    )


def text_of_argument(text: str, name: str) -> str:
    """The text that a shell passed as UTF-8, in whatever locale Python reads its arguments. Raises DataError if not."""
    try:
        raw = os.fsencode(text)
    except UnicodeEncodeError:  # it came from no shell
        return text
    return _decoded(raw, name, "write it in UTF-8, or put it into a file in UTF-8 and pass --file")


def _decoded(raw: bytes, name: str, fix: str, *, whole: bool = True) -> str:
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(raw, final=whole)
    except UnicodeDecodeError as e:
        raise DataError(
            what=f"{name}: not a text in UTF-8",
            why=f"{e.reason} at byte {e.start}; token ids are those of UTF-8",
            fix=fix,
        ) from e


def tokenize_text(base: Base, text: str, *, parse_special: bool = False) -> Tokenized:
    """The ids of a text, no BOS in front. Raises DataError for half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise DataError(
            what=f"half of a surrogate pair at character {e.start} of the text",
            why="half a pair is no character, and no tokenizer reads it",
            fix="take it out, or write the whole character",
        ) from e
    return Tokenized(text, base.tokenizer.encode(text, parse_special=parse_special).ids)


def tokenize_chats(base: Base, path: Path) -> tuple[int, Iterator[Tokenized]]:
    """How many conversations a JSONL file (standard input for `-`) holds, and each as it is trained, one by one.

    Raises DataError for a file that cannot be read, and for a row that the template refuses when its turn comes.
    """
    rows = read_conversations(Path("/dev/stdin") if str(path) == "-" else path)
    template = base.template

    def numbered(number: int, row: Conversation) -> Tokenized:
        try:
            return tokenize_chat(base.tokenizer, template, row)
        except DataError as e:
            raise DataError(f"row {number}: {e.what}", e.why, e.fix) from e

    return len(rows), (numbered(number, row) for number, row in enumerate(rows, 1))


def tokenize_chat(tokenizer: Tokenizer, template: ChatTemplate, row: Conversation) -> Tokenized:
    """One conversation as it is trained."""
    said = Turns(row, template)
    example = encode_turns(said, tokenizer, weights=turn_weights(row))
    parts = tuple(part for part, _, _ in cut(said.rendered, tokenizer))
    return Tokenized(said.rendered.text, example.input_ids.tolist(), example.loss_mask.tolist(), parts)


def tokens_of(base: Base, row: Tokenized, first: int | None = None) -> Iterator[Token]:
    """The `first` tokens of a row, or all."""
    t = base.tokenizer
    control, learned = set(t.control.values()), row.learned or [False] * len(row.ids)
    for token, has_loss in islice(zip(row.ids, learned, strict=True), first):
        yield Token(token, t.piece(token, special=True), token in control, has_loss)


# -- llama.cpp's answer -------------------------------------------------------------------------------------------


def check(
    base: Base, rows: Sequence[Tokenized], *, parse_special: bool = False, on_progress: OnProgress = silent
) -> int:
    """Compare every id with llama.cpp's; returns how many ids were compared.

    Raises CertificateError, which names the first difference.
    """
    return run_in_child(_check, base.path, rows, parse_special, on_progress=on_progress)


def difference_of_chat(tokenizer: Tokenizer, model: Model, row: Tokenized) -> Difference | None:
    """Where llama.cpp gives a rendered conversation other ids.

    It reads the whole prompt; or part by part, where it would take somebody's words for special tokens.
    """
    if any(isinstance(part, str) and tokenizer.control_pattern.search(part) for part in row.parts):
        theirs = [i for part in row.parts for i in _part_in_llama_cpp(tokenizer, model, part)]
    else:
        theirs = model.tokenize(row.text, parse_special=True)
    bos = tokenizer.bos_id
    if tokenizer.add_bos and bos is not None and theirs[:1] != [bos]:
        theirs = [bos, *theirs]
    return _difference(row.ids, theirs)


def _part_in_llama_cpp(tokenizer: Tokenizer, model: Model, part: int | str) -> list[int]:
    if isinstance(part, int):
        return model.tokenize(tokenizer.text_of(part), parse_special=True)
    return model.tokenize(part, parse_special=False)


def _difference(ours: Sequence[int], theirs: Sequence[int]) -> Difference | None:
    pairs = enumerate(zip_longest(ours, theirs))
    return next((Difference(i, a, b) for i, (a, b) in pairs if a != b), None)


def _check(base_path: Path, rows: Sequence[Tokenized], parse_special: bool, on_progress: OnProgress) -> int:
    base, pace = open_base(base_path), Pace(len(rows))
    with _vocabulary_in_llama_cpp(base) as model:
        for row in rows:
            if row.learned is None:
                found = _difference(row.ids, model.tokenize(row.text, parse_special=parse_special))
            else:
                found = difference_of_chat(base.tokenizer, model, row)
            if found is not None:
                raise _not_the_same(base, found, "" if row.learned is None else f" of row {pace.done + 1}")
            _, eta = pace.step(len(row.ids))
            on_progress(Progress("check", pace.done, pace.total, eta_s=eta))
    return pace.tokens


@contextmanager
def _vocabulary_in_llama_cpp(base: Base) -> Iterator[Model]:
    """llama.cpp with the base's vocabulary and no weights; that of a checkpoint is written to a file of its own."""
    from runtime.binding import Model

    with tempfile.TemporaryDirectory() as folder:
        path = base.path
        if not base.is_gguf:
            path = Path(folder) / "vocabulary.gguf"
            _write_vocabulary(path, base)
        model = Model(path, vocabulary_only=True)
        try:
            yield model
        finally:
            model.close()


def _write_vocabulary(path: Path, base: Base) -> None:
    """A GGUF that llama.cpp loads with `vocab_only`: it asks for an architecture and `tokenizer.ggml.*`."""
    writer = gguf.GGUFWriter(path, base.architecture.gguf_name)
    if base.vocabulary.strip_after_special:
        writer.add_name("phi-3")  # see Vocabulary
    base.vocabulary.add_to(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _not_the_same(base: Base, found: Difference, where: str) -> CertificateError:
    def spelled(token: int | None) -> str:
        return "the end" if token is None else f"{token} {base.tokenizer.piece(token, special=True)!r}"

    return CertificateError(
        what=f"{base.path}: id {found.position}{where} is {spelled(found.ours)}, in llama.cpp {spelled(found.theirs)}",
        why="what is trained on one and run on the other sees another text",
        fix="please report it with this text and the output of `edgelora doctor`; use another base until then",
    )
