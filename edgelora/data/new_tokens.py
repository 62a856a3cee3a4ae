"""A vocabulary with more tokens: which texts it can take, at which ids, and what each of them was before.

Trailing padding (`[PAD151665]` …: rows that a model has beyond its tokens) gives its ids first; the others follow the
last one. Merges and scores stay as they are: a text without the new tokens keeps its ids. Behind the new ones stands
padding again where the number of rows would else lose a divisor: llama.cpp's fast kernels take rows by 4, 8 or 16, and
what it computes with instead sums in another order.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gguf.constants import TokenType

from edgelora.data.sentencepiece import SPACE
from edgelora.data.tokenizer import Tokenizer
from edgelora.data.vocabulary import Vocabulary, checked
from edgelora.errors import ConfigError, some

SCORE = -1000.0  # llama.cpp's converter gives it to added tokens; they are found by their texts, and never merged
PADDING_SCORE = -10000.0
PADDING = re.compile(r"\[PAD\d+\]")
ALIGNED = 64  # the most that a number of rows is kept a multiple of


@dataclass(frozen=True)
class Grown:
    """`vocabulary` is the larger one; the new tokens are `first`, `first` + 1 … in it, in the order of `pieces`."""

    vocabulary: Vocabulary
    first: int
    pieces: tuple[tuple[int, ...], ...]
    """Of each new token, the ids that its text had before."""
    padding: int
    """How many ids stand behind them for the sake of the number alone."""

    @property
    def ids(self) -> range:
        """Of the new tokens."""
        return range(self.first, self.first + len(self.pieces))

    @property
    def written(self) -> slice:
        """The part of the larger vocabulary that is another than before: the new tokens, and padding behind them."""
        return slice(self.first, self.ids.stop + self.padding)

    @property
    def texts(self) -> tuple[str, ...]:
        """Of the new tokens, by their ids."""
        return self.vocabulary.tokens[self.first : self.ids.stop]

    @property
    def n_tokens(self) -> int:
        """Of the larger vocabulary."""
        return len(self.vocabulary.tokens)


def with_tokens(tokenizer: Tokenizer, texts: Sequence[str], *, control: bool, source: Path) -> Grown:
    """The vocabulary of `tokenizer` and these tokens: read out of any text, or if `control` only where they are meant.

    Raises ConfigError, naming the faults of the list, for a text that is empty, stands twice, is a token already, or
    that llama.cpp would cut in another way; `source` is what the vocabulary was read from.
    """
    if not texts:
        raise ConfigError("no token to add", "none was named", "pass --token TEXT, or --from-file FILE")
    if faults := [f"{text!r} {fault}" for text, fault in _unfit(tokenizer, texts)]:
        raise _refused(source, faults)
    old, first = tokenizer.vocabulary, _first_free(tokenizer.vocabulary)
    after = first + len(texts)
    step = math.gcd(len(old.tokens), ALIGNED)
    padding = -after % step if after > len(old.tokens) else 0
    kind = TokenType.CONTROL if control else TokenType.USER_DEFINED
    new_types = [kind] * len(texts) + [TokenType.UNUSED] * padding
    new_scores = [SCORE] * len(texts) + [PADDING_SCORE] * padding
    vocabulary = replace(
        old,
        tokens=(*old.tokens[:first], *texts, *(f"[PAD{after + i}]" for i in range(padding)), *old.tokens[after:]),
        types=(*old.types[:first], *new_types, *old.types[after:]),
        scores=(*old.scores[:first], *new_scores, *old.scores[after:]) if old.scores else (),
    )
    pieces = tuple(tuple(tokenizer.encode(text).ids) for text in texts)
    grown = Grown(checked(vocabulary, source), first, pieces, padding)
    if faults := list(_misread(tokenizer, grown)):
        raise _refused(source, faults)
    return grown


def _refused(source: Path, faults: Sequence[str]) -> ConfigError:
    return ConfigError(
        what=f"{source}: {some(faults, 5)}",
        why="a new token is one that llama.cpp reads as one id wherever its text stands, and nothing else changes",
        fix="leave these out or name them otherwise; a token that is there is trained as it is (--train-tokens)",
    )


def _first_free(vocabulary: Vocabulary) -> int:
    """The first of the padding at the end, where there is any."""
    first = len(vocabulary.tokens)
    while first and vocabulary.types[first - 1] == TokenType.UNUSED and _is_padding(vocabulary, first - 1):
        first -= 1
    return first


def _is_padding(vocabulary: Vocabulary, token: int) -> bool:
    return vocabulary.tokens[token] == f"[PAD{token}]"  # as llama.cpp's converter and ours call it


def _unfit(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The texts that cannot be new tokens, and why; each once."""
    known = {text: token for token, text in enumerate(tokenizer.tokens)}
    for text, count in Counter(texts).items():
        if not text:
            yield text, "is empty"
        elif count > 1:
            yield text, f"is named {count} times"
        elif "\0" in text or not _is_unicode(text):
            yield text, "is no text that a GGUF can hold"
        elif text in known:
            yield text, f"is a token already ({known[text]})"
        elif len(ids := tokenizer.encode(text).ids) < 2:
            yield text, f"is a token already ({ids[0]})" if ids else "is no text to this tokenizer"
        elif tokenizer.control_pattern.search(text):
            yield text, "holds a control token, which would no longer be read"
        elif PADDING.fullmatch(text):
            yield text, "is what padding is called"
        elif SPACE in text and tokenizer.vocabulary.model == "llama":
            yield text, f"holds {SPACE}, which stands for a space in this vocabulary"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _misread(before: Tokenizer, grown: Grown) -> Iterator[str]:
    """What llama.cpp would make of the larger vocabulary that was not asked for."""
    after = Tokenizer(grown.vocabulary)
    n, new = len(before.tokens), {*grown.ids}
    changed = [i for i in range(n) if i not in new and before.types[i] != after.types[i]]
    ends = {*before.eog_ids} ^ {*after.eog_ids} - new
    if changed or ends:
        text = before.tokens[min([*changed, *ends])]
        yield f"beside one of these llama.cpp takes {text!r} for a token of another kind"
    marks = [before.text_of(i) for i in before.control.values() if before.strips_after(i)][:1]
    for token, text in zip(grown.ids, grown.texts, strict=True):
        control = grown.vocabulary.types[token] == TokenType.CONTROL
        if after.types[token] != grown.vocabulary.types[token]:
            yield f"{text!r} is {'no' if control else 'a'} control token to llama.cpp, by its name"
        elif control and token in after.encode(text).ids:
            yield f"{text!r} would be read out of plain text too"
        else:
            said = {text: 1, f"a {text}, b": 1, text * 2: 2, **{f"{mark}{text}": 1 for mark in marks}}
            if any(after.encode(t, parse_special=True).ids.count(token) != times for t, times in said.items()):
                yield f"{text!r} would be cut otherwise where other text stands beside it"
