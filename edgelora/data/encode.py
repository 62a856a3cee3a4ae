"""A conversation → token ids and a loss mask. The only place that decides which tokens are learned.

The rendered prompt is cut at the special tokens that the *template* wrote; the text between two of them is tokenized
whole, so merges across header and content are llama.cpp's. Special-token text inside a message stays text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgelora.data.conversation import Conversation, Message
from edgelora.data.template import ChatTemplate, Rendered, Span
from edgelora.data.tokenizer import Tokenizer
from edgelora.errors import DataError


@dataclass(frozen=True)
class Example:
    """`input_ids` (T,) and `loss_mask` (T,): True where a token is one that the model must learn to say."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    group: str | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


def encode_prompt(messages: Sequence[Message], tokenizer: Tokenizer, template: ChatTemplate) -> list[int]:
    """The ids after which the assistant speaks."""
    rendered = template.render(messages, generation_prompt=True)
    return _with_bos([i for i, _, _ in _pieces(rendered, tokenizer)], tokenizer)


def encode_conversation(conversation: Conversation, tokenizer: Tokenizer, template: ChatTemplate) -> Example:
    """The whole conversation with loss on each assistant turn and on the token that ends it."""
    rendered = template.render(conversation.messages)
    learn = [s for s in rendered.spans if conversation.messages[s.message].role == "assistant"]
    pieces = list(_pieces(rendered, tokenizer))
    mask = [any(_belongs(rendered.text, start, end, s) for s in learn) for _, start, end in pieces]
    for span in learn:
        if (end_of_turn := _end_of_turn(pieces, span, tokenizer)) is not None:
            mask[end_of_turn] = True
    ids = [i for i, _, _ in pieces]
    bos = len(_with_bos(ids, tokenizer)) - len(ids)
    if not any(mask):
        raise DataError(
            what="a conversation has no token to learn",
            why="the chat template leaves the assistant's words out of the prompt",
            fix="use a base whose template shows assistant messages",
        )
    return Example(
        np.array(_with_bos(ids, tokenizer), np.int64), np.array([False] * bos + mask, bool), conversation.group
    )


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


def _pieces(rendered: Rendered, tokenizer: Tokenizer) -> Iterator[tuple[int, int, int]]:
    """(id, first character, last + 1) for each token of a rendered prompt."""
    at = 0
    for match in tokenizer.control_pattern.finditer(rendered.text):
        if any(s.start < match.end() and match.start() < s.end for s in rendered.spans):
            continue  # somebody's words, not the template's
        yield from _text(rendered.text, at, match.start(), tokenizer)
        yield tokenizer.control[match.group()], match.start(), match.end()
        at = match.end()
    yield from _text(rendered.text, at, len(rendered.text), tokenizer)


def _text(text: str, start: int, end: int, tokenizer: Tokenizer) -> Iterator[tuple[int, int, int]]:
    if start < end:
        encoded = tokenizer.encode(text[start:end])
        for token, (first, last) in zip(encoded.ids, encoded.offsets, strict=True):
            yield token, start + first, start + last


def _belongs(text: str, start: int, end: int, span: Span) -> bool:
    """Whether a token says something of `span`, and besides it at most the blank that stands before it."""
    return start < span.end and span.start < end and not (text[start : span.start] + text[span.end : end]).strip()


def _end_of_turn(pieces: list[tuple[int, int, int]], span: Span, tokenizer: Tokenizer) -> int | None:
    """The index of the first token after `span` if it ends a generation (white space may stand between)."""
    for index, (token, start, _) in enumerate(pieces):
        if start >= span.end:
            if token in tokenizer.eog_ids:
                return index
            if tokenizer.decode([token]).strip():
                return None
    return None


def _with_bos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    bos = tokenizer.bos_id
    return [bos, *ids] if tokenizer.add_bos and bos is not None and ids[:1] != [bos] else ids
