"""Rows → examples of at most `max_length` tokens. What does not fit keeps whole turns where it can, and is counted.

A conversation loses turns from its end, down to an answer that is learned; its system message and first question stay,
and only where not even the first such answer fits whole is that answer cut. Where the last answer alone is learned, no
other takes its place. A document is no answer that could break off: it becomes several examples.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple, Protocol

import numpy as np

from edgelora.data.encode import Example, LossOn, encode_conversation, encode_document, encode_tokenized, turn_weights
from edgelora.data.rows import Conversation, Document, Preference, Rated, Row
from edgelora.data.template import ChatTemplate
from edgelora.data.tokenizer import Tokenizer


class Speech(Protocol):
    """What a base model says of how it is spoken to. `template` may raise where it has none: documents need none."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def template(self) -> ChatTemplate: ...


class Cut(NamedTuple):
    """What a row lost. `kept` of `tokens` are left, 0 where nothing to learn was left and the row was left out.

    Of the answers that are learned, `turns` were left out whole, and `ends` lost only their end.
    """

    tokens: int
    kept: int
    turns: int
    ends: int


@dataclass(frozen=True)
class Encoded:
    """The examples that a row became: two of a preference (chosen, rejected), several of a long document, else one.

    `tokens` it had before anything was cut; `examples` is empty where nothing to learn was left.
    """

    examples: tuple[Example, ...]
    tokens: int
    cut: Cut | None = None


@dataclass(frozen=True)
class Encoder:
    """How rows become examples. Without `truncate` only documents are held to `max_length`: the caller refuses the
    rest, naming the rows. Raises DataError for a row that cannot be encoded.

    context: the longest row that the base can see, which `max_length` may lie below; None where nobody asks.
    """

    speech: Speech
    max_length: int | None = None
    truncate: bool = False
    loss_on: LossOn = "all"
    context: int | None = None

    def encode(self, row: Row) -> Encoded:
        """The examples of a row, each at most `max_length` long where it may be cut."""
        if isinstance(row, Document):
            return self._document(row)
        if isinstance(row, Conversation):
            return self._conversation(row)
        if isinstance(row, Preference):
            return self._ends_cut(self._whole(row.chosen), self._whole(row.rejected))
        if isinstance(row, Rated):
            return self._ends_cut(self._whole(row.conversation))
        return self._ends_cut(encode_tokenized(row, self.speech.tokenizer))

    def _whole(self, conversation: Conversation) -> Example:
        return encode_conversation(conversation, self.speech.tokenizer, self.speech.template, self.loss_on)

    def _fits(self, length: int) -> bool:
        return not self.truncate or self.max_length is None or length <= self.max_length

    def _conversation(self, row: Conversation) -> Encoded:
        whole = self._whole(row)
        if self._fits(len(whole)) or self.max_length is None:
            return _encoded(len(whole), None, whole)

        @cache
        def up_to(end: int) -> Example:
            return self._whole(replace(row, messages=row.messages[:end]))

        # where an answer says nothing there is nothing to learn up to it
        answers = zip(row.messages, turn_weights(row, self.loss_on), strict=True)
        ends = [i for i, (message, weight) in enumerate(answers, 1) if weight > 0 and message.says_something]
        if not ends:
            return _left_out(len(whole), Cut(len(whole), 0, 0, 0))
        fitting = bisect.bisect_right(ends, self.max_length, key=lambda end: len(up_to(end)))
        dropped = len(ends) - fitting
        if fitting:
            kept = up_to(ends[fitting - 1])
            return _encoded(len(whole), Cut(len(whole), len(kept), dropped, 0), kept)
        kept = up_to(ends[0])[: self.max_length]
        return _encoded(len(whole), Cut(len(whole), len(kept), dropped - 1, 1), kept)

    def _ends_cut(self, *examples: Example) -> Encoded:
        """One or two answers to a prompt: there are no turns to leave out. Two that are left alike teach nothing."""
        tokens, kept, cut = sum(map(len, examples)), examples, None
        if not all(self._fits(len(e)) for e in examples):
            kept = tuple(e[: self.max_length] for e in examples)
            n_ends = sum(bool(e.loss_mask[self.max_length :].any()) for e in examples)
            cut = Cut(tokens, sum(map(len, kept)), 0, n_ends)
        if len(kept) == 2 and np.array_equal(kept[0].input_ids, kept[1].input_ids):
            return _left_out(tokens, cut)
        return _encoded(tokens, cut, *kept)

    def _document(self, row: Document) -> Encoded:
        whole = encode_document(row, self.speech.tokenizer)
        if self.max_length is None or len(whole) <= self.max_length:
            return _encoded(len(whole), None, whole)
        return _encoded(len(whole), None, *split(whole, self.max_length))


def split(document: Example, max_length: int) -> list[Example]:
    """Parts of at most `max_length` tokens in which every token of the document is learned once.

    Each part begins with BOS if the document does; else with the last token of the part before it, so that the first
    of its own has something to follow.
    """
    ids, begins = document.input_ids, not document.loss_mask[0]
    parts = []
    for at in range(0, len(ids) - 1, max_length - 1):
        part = ids[at : at + max_length].copy()
        if begins:
            part[0] = ids[0]
        parts.append(Example(part, np.arange(len(part)) > 0))
    return parts


def _encoded(tokens: int, cut: Cut | None, *examples: Example) -> Encoded:
    """Without the examples, if one of them teaches nothing."""
    if all(e.n_loss_tokens for e in examples):
        return Encoded(examples, tokens, cut)
    return _left_out(tokens, cut)


def _left_out(tokens: int, cut: Cut | None) -> Encoded:
    return Encoded((), tokens, None if cut is None else Cut(cut.tokens, 0, cut.turns + cut.ends, 0))
