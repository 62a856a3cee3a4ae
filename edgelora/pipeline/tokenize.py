"""Texts and conversations → ids as training sees them, and the same ids held against llama.cpp's own tokenizer."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import gguf

from edgelora.base.model import Base, open_base
from edgelora.child import run_in_child
from edgelora.data.conversation import Conversation, read_conversations
from edgelora.data.encode import encode_conversation
from edgelora.data.template import ChatTemplate
from edgelora.data.tokenizer import Tokenizer
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
        if len(raw) <= LARGEST_TEXT:
            return raw.decode()
    except OSError as e:
        raise DataError(
            what=f"{path}: cannot be read ({e.strerror})",
            why="the path is wrong, or is not a file",
            fix="check the spelling of the path",
        ) from e
    except UnicodeDecodeError as e:
        raise DataError(
            what=f"{path}: not a text in UTF-8",
            why=f"{e.reason} at byte {e.start}; token ids are those of UTF-8",
            fix="convert the file to UTF-8",
        ) from e
    raise DataError(
        what=f"{path}: a text of more than {LARGEST_TEXT >> 20} MB",
        why="a text is tokenized whole, in memory",
        fix=f"pass a part of it: head -n 10000 {path} | edgelora tokenize … --file -",
    )


def tokenize_text(base: Base, text: str, *, parse_special: bool = False) -> Tokenized:
    """The ids of a text, no BOS in front. Raises DataError for half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise DataError(
            what="the text is not Unicode",
            why=f"{e.reason} at character {e.start}",
            fix="put it into a file in UTF-8 and pass --file",
        ) from e
    return Tokenized(text, base.tokenizer.encode(text, parse_special=parse_special).ids)


def tokenize_chats(base: Base, path: Path) -> tuple[int, Iterator[Tokenized]]:
    """How many conversations a JSONL file holds, and each as it is trained, one after another.

    Raises DataError for a file that cannot be read, and for a row that the template refuses when its turn comes.
    """
    rows, template = read_conversations(path), base.template

    def numbered(number: int, row: Conversation) -> Tokenized:
        try:
            return tokenize_chat(base.tokenizer, template, row)
        except DataError as e:
            raise DataError(f"row {number}: {e.what}", e.why, e.fix) from e

    return len(rows), (numbered(number, row) for number, row in enumerate(rows, 1))


def tokenize_chat(tokenizer: Tokenizer, template: ChatTemplate, row: Conversation) -> Tokenized:
    """One conversation as it is trained."""
    example = encode_conversation(row, tokenizer, template)
    prompt = template.render(row.messages, tools=row.tools)
    return Tokenized(prompt.text, example.input_ids.tolist(), example.loss_mask.tolist())


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


def first_difference(tokenizer: Tokenizer, model: Model, ids: Sequence[int]) -> Difference | None:
    """Where llama.cpp gives the texts that these ids spell other ids, each between two control tokens by itself."""
    control, at = set(tokenizer.control.values()), 0
    for special, group in groupby(ids, control.__contains__):
        ours = list(group)
        text = "".join(map(tokenizer.text_of, ours)) if special else tokenizer.decode(ours)
        if (found := _difference(ours, model.tokenize(text, parse_special=special), at)) is not None:
            return found
        at += len(ours)
    return None


def _difference(ours: Sequence[int], theirs: Sequence[int], at: int = 0) -> Difference | None:
    pairs = enumerate(zip_longest(ours, theirs), at)
    return next((Difference(i, a, b) for i, (a, b) in pairs if a != b), None)


def difference_of_chat(tokenizer: Tokenizer, model: Model, row: Tokenized) -> Difference | None:
    """Where llama.cpp gives a rendered conversation other ids.

    It reads the whole prompt; or text by text, if it would take somebody's words for special tokens.
    """
    control, bos = set(tokenizer.control.values()), tokenizer.bos_id
    theirs = model.tokenize(row.text, parse_special=True)
    if tokenizer.add_bos and bos is not None and theirs[:1] != [bos]:
        theirs = [bos, *theirs]
    if sum(i in control for i in theirs) > sum(i in control for i in row.ids):
        return first_difference(tokenizer, model, row.ids)
    return _difference(row.ids, theirs)


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
