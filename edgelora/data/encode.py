"""A conversation → token ids and a loss mask. The only place that decides which tokens are learned.

The rendered prompt is cut at the special tokens that the *template* wrote; the text between two of them is tokenized
whole, so merges across header and content are llama.cpp's. Special-token text inside a message stays text.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from edgelora.data.conversation import Conversation, Message
from edgelora.data.rendering.tracked import TEMPLATES_OWN
from edgelora.data.template import ChatTemplate, Rendered
from edgelora.data.tokenizer import Tokenizer
from edgelora.data.turns import Turn, Turns
from edgelora.errors import DataError

BLANK = " \t\n\v\f\r"  # what llama.cpp drops behind a special token, where a model asks for it
Piece: TypeAlias = tuple[int, int, int]  # a token's id, its first character in the rendered text, its last + 1


@dataclass(frozen=True)
class Example:
    """`input_ids` (T,) and `loss_mask` (T,): True where a token is one that the model must learn to say."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    group: str | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


def encode_prompt(
    messages: Sequence[Message], tokenizer: Tokenizer, template: ChatTemplate, tools: Sequence[Mapping[str, Any]] = ()
) -> list[int]:
    """The ids after which the assistant speaks."""
    rendered = template.render(messages, generation_prompt=True, tools=tools)
    return _with_bos([i for i, _, _ in _pieces(rendered, tokenizer)], tokenizer)


def encode_conversation(conversation: Conversation, tokenizer: Tokenizer, template: ChatTemplate) -> Example:
    """The whole conversation with loss on each assistant turn (as `turns` finds it) and on the token that ends it."""
    return encode_turns(Turns(conversation, template), tokenizer, conversation.group)


def encode_turns(said: Turns, tokenizer: Tokenizer, group: str | None = None) -> Example:
    """The same of a conversation that is rendered already."""
    pieces = list(_pieces(said.rendered, tokenizer))
    mask = [False] * len(pieces)
    for turn in said.turns:
        _learn(mask, pieces, said, turn, tokenizer)
    ids = [i for i, _, _ in pieces]
    bos = len(_with_bos(ids, tokenizer)) - len(ids)
    if not any(mask):
        raise DataError(
            what="a conversation has no token to learn",
            why="the chat template leaves the assistant's words out of the prompt",
            fix="use a base whose template shows assistant messages",
        )
    return Example(np.array(_with_bos(ids, tokenizer), np.int64), np.array([False] * bos + mask, bool), group)


def encode_all(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, template: ChatTemplate, max_length: int
) -> list[Example]:
    """Encode every row. Raises DataError, naming the rows, if some are longer than `max_length` tokens."""
    examples = [encode_conversation(c, tokenizer, template) for c in conversations]
    long = [f"row {i} ({len(e)})" for i, e in enumerate(examples, 1) if len(e) > max_length]
    if long:
        shown = ", ".join(long[:10]) + (f" and {len(long) - 10} more" if len(long) > 10 else "")
        raise DataError(
            what=f"{len(long)} rows are longer than {max_length} tokens: {shown}",
            why="cutting them would teach answers that break off",
            fix=f"pass --max-length {max(len(e) for e in examples)}, or shorten these rows",
        )
    return examples


def cut(rendered: Rendered, tokenizer: Tokenizer) -> Iterator[tuple[int | str, int, int]]:
    """A prompt as it is tokenized: the ids of the template's own special tokens, and each text between two of them.

    Each with its first character in the prompt and its last + 1. A BOS in front, where one is added, is not among them.
    """
    at = 0
    for match in tokenizer.control_pattern.finditer(rendered.text):
        if rendered.origin[match.start() : match.end()].strip(TEMPLATES_OWN):
            continue  # somebody's words, not the template's
        if at < match.start():
            yield rendered.text[at : match.start()], at, match.start()
        yield tokenizer.control[match.group()], match.start(), match.end()
        at = match.end()
        if tokenizer.strips_after(tokenizer.control[match.group()]):
            at += len(rendered.text[at:]) - len(rendered.text[at:].lstrip(BLANK))
    if at < len(rendered.text):
        yield rendered.text[at:], at, len(rendered.text)


def _pieces(rendered: Rendered, tokenizer: Tokenizer) -> Iterator[Piece]:
    for part, start, end in cut(rendered, tokenizer):
        if isinstance(part, int):
            yield part, start, end
        else:
            encoded = tokenizer.encode(part)
            for token, (first, last) in zip(encoded.ids, encoded.offsets, strict=True):
                yield token, start + first, start + last


def _learn(mask: list[bool], pieces: list[Piece], said: Turns, turn: Turn, tokenizer: Tokenizer) -> None:
    """Mark the tokens of a turn: what is said in it and all that the template writes after it, up to its end.

    A token that also holds something before the turn is learned only if that is blank (` light` after `assistant:`).
    """
    text, origin = said.rendered.text, said.rendered.origin
    begin = bisect.bisect_right(pieces, turn.start, key=lambda piece: piece[2])
    end = _end(pieces[begin:], said, turn, tokenizer)
    for index, (_, first, last) in enumerate(pieces[begin:], begin):
        if first >= end:
            return
        around = text[first : turn.start] + text[end:last]
        of_the_data = first >= turn.end and not text[first:last].strip() and origin[first:last].strip(TEMPLATES_OWN)
        mask[index] = not around.strip() and not of_the_data


def _end(pieces: list[Piece], said: Turns, turn: Turn, tokenizer: Tokenizer) -> int:
    """Where the token ends that ends the generation: the first such one behind the turn, if it follows at once or
    stands there also where nothing follows. Else the end of what belongs to the turn."""
    at_once, others = True, said.next_speaker(turn)
    for token, first, last in pieces:
        if first >= others:
            break
        if first >= turn.end and token in tokenizer.eog_ids:
            if at_once or tokenizer.tokens[token] in said.tail(turn):
                return last
            break
        at_once = at_once and not said.rendered.text[max(first, turn.end) : last].strip()
    return said.closed(turn)


def _with_bos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    bos = tokenizer.bos_id
    return [bos, *ids] if tokenizer.add_bos and bos is not None and ids[:1] != [bos] else ids
