"""What is said in a check, as tokens: the same ids for every side that computes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgelora.data.conversation import Conversation
from edgelora.data.encode import Example, encode_conversation
from edgelora.errors import DataError
from edgelora.pipeline.check_rows import CHECK_TEXTS, DEFAULT_CHECK, Speaks, require_template
from edgelora.pipeline.tokenize import Tokenized, tokenize_chat

ROWS_TOGETHER = 8
TOKENS_TOGETHER = 64  # unless one row alone is longer: logits are float32 over the whole vocabulary
ROW_TOKENS = 256  # of a row, what is compared at most: of Gemma's vocabulary these are 270 MB of logits
SHORTEST = 2  # tokens: one to begin with, and one to compare

Group = Sequence[Example]


@dataclass(frozen=True)
class Said:
    """Conversations (none where the model's template knows no such) and texts; `groups` are computed one by one."""

    rows: Sequence[Conversation]
    chats: Sequence[Tokenized]
    texts: Sequence[Tokenized]
    groups: Sequence[Group]

    @classmethod
    def read(cls, base: Speaks, context: int, rows: Sequence[Conversation] | None) -> Said:
        """`rows`, or the built-in ones, as `base` reads them, no more than `context` tokens of each.

        Plain texts, if the base's template knows no such conversations or is none. Raises DataError if rows were given
        that it cannot read.
        """
        texts = [Tokenized(text, base.tokenizer.encode(text).ids) for text in CHECK_TEXTS]
        rows, chats = _chats(base, rows)
        return cls(rows, chats, texts, list(groups_of(_examples(chats or texts, min(context, ROW_TOKENS)))))

    @property
    def examples(self) -> list[Example]:
        """Those of all groups, one group behind another."""
        return [example for group in self.groups for example in group]


def answered(base: Speaks, rows: Sequence[Conversation], room: int) -> list[Group]:
    """The rows as they are trained on, in groups; of a long one what `within` leaves of it."""
    examples = [encode_conversation(row, base.tokenizer, base.template) for row in rows]
    return list(groups_of([within(example, room) for example in examples]))


def within(example: Example, room: int) -> Example:
    """At most `room` tokens, of which at most half, and ROW_TOKENS, are compared: how the last answer begins, and what
    is learned before it.

    What follows the last of them changes nothing, and goes first; then what lies behind the first token, which may be
    BOS. So an aLoRA's invocation, right before the answer, stays. Some token behind the first is learned.
    """
    learned = 1 + np.flatnonzero(example.loss_mask[1:])
    if len(example) <= room and len(learned) <= ROW_TOKENS:
        return example
    assert len(learned)
    assert room >= SHORTEST
    most = min(ROW_TOKENS, room // 2)
    gaps = np.flatnonzero(np.diff(learned) > 1)
    answer = int(gaps[-1]) + 1 if len(gaps) else 0  # where among the learned ones the last answer begins
    compared = learned[: answer + most][-most:]
    kept = _up_to(int(compared[-1]) + 1, room)
    return Example(example.input_ids[kept], np.isin(kept, compared))


def groups_of(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """The examples in their order, a few at a time."""
    group: list[Example] = []
    for example in examples:
        if group and (len(group) == ROWS_TOGETHER or sum(map(len, group)) + len(example) > TOKENS_TOGETHER):
            yield group
            group = []
        group.append(example)
    yield group


def _chats(base: Speaks, rows: Sequence[Conversation] | None) -> tuple[Sequence[Conversation], list[Tokenized]]:
    if base.template_source is None:
        if rows is not None:
            require_template(base)
        return (), []
    try:
        asked = DEFAULT_CHECK if rows is None else rows
        return asked, [tokenize_chat(base.tokenizer, base.template, row) for row in asked]
    except DataError:
        if rows is not None:
            raise
        return (), []  # a template that does not parse, or wants other roles, is no fault of the file


def _examples(said: Sequence[Tokenized], room: int) -> list[Example]:
    """Every token is compared, the template's too, but what all rows begin with only once."""
    ids = [np.array(_cut(row, room), np.int64) for row in said]
    shortest = min(map(len, ids))
    differ = np.flatnonzero((np.stack([row[:shortest] for row in ids]) != ids[0][:shortest]).any(0))
    shared = int(differ[0]) if len(differ) else shortest - 1
    return [Example(row, np.arange(len(row)) > (shared if i else 0)) for i, row in enumerate(ids)]


def _cut(row: Tokenized, room: int) -> list[int]:
    """At most `room` ids. Of a longer conversation the first, which may be BOS, and those up to its last answer's end.

    Both sides see the same ids, so a question that is cut costs nothing; an answer that is cut would not be compared.
    """
    if row.learned is None or len(row.ids) <= room:
        return row.ids[:room]
    end = 1 + max((i for i, learned in enumerate(row.learned) if learned), default=room - 1)
    return row.ids[:room] if end <= room else [row.ids[i] for i in _up_to(end, room)]


def _up_to(end: int, room: int) -> list[int]:
    """The first place and those up to `end`, `room` of them at most."""
    return [0, *range(max(1, end - room + 1), end)]
