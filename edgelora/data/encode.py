"""A conversation or a document → token ids and a loss mask. The only place that decides which tokens are learned.

The rendered prompt is cut at the special tokens that the *template* wrote; the text between two of them is tokenized
whole, so merges across header and content are llama.cpp's. Special-token text inside a message stays text.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from edgelora.data.rendering.tracked import TEMPLATES_OWN
from edgelora.data.rows import Conversation, Document, Message, Tokenized
from edgelora.data.template import ChatTemplate, Rendered
from edgelora.data.tokenizer import Tokenizer
from edgelora.data.turns import Turn, Turns
from edgelora.errors import DataError

BLANK = " \t\n\v\f\r"  # what llama.cpp drops behind a special token, where a model asks for it
LossOn: TypeAlias = Literal["all", "last"]
Piece: TypeAlias = tuple[int, int, int]  # a token's id, its first character in the rendered text, its last + 1


@dataclass(frozen=True)
class Example:
    """`input_ids` (T,) and `loss_mask` (T,): True where a token is one that the model must learn to say.

    `weights` (T,) float32: what each token counts in the loss, 0 where `loss_mask` is False. None: all learned ones 1.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    group: str | None = None
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def n_loss_tokens(self) -> int:
        """Tokens that are learned: nothing comes before the first one, so it is never among them."""
        return int(np.count_nonzero(self.loss_mask[1:]))

    def __getitem__(self, part: slice) -> Example:
        """Some of its tokens in a row."""
        weights = None if self.weights is None else self.weights[part]
        return Example(self.input_ids[part], self.loss_mask[part], self.group, weights)


def encode_prompt(
    messages: Sequence[Message], tokenizer: Tokenizer, template: ChatTemplate, tools: Sequence[Mapping[str, Any]] = ()
) -> list[int]:
    """The ids after which the assistant speaks."""
    rendered = template.render(messages, generation_prompt=True, tools=tools)
    return _with_bos([i for i, _, _ in _pieces(rendered, tokenizer)], tokenizer)


def encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a text that goes on: BOS in front, if the model's texts have one. Special-token text stays text."""
    return _with_bos(tokenizer.encode(text).ids, tokenizer)


def encode_conversation(
    conversation: Conversation, tokenizer: Tokenizer, template: ChatTemplate, loss_on: LossOn = "all"
) -> Example:
    """The whole conversation with loss on each assistant turn (as `turns` finds it) and on the token that ends it.

    `loss_on="last"`: on the last turn alone. A message's weight is that of its turn's tokens.
    """
    said = Turns(conversation, template)
    return encode_turns(said, tokenizer, conversation.group, turn_weights(conversation, loss_on))


def turn_weights(conversation: Conversation, loss_on: LossOn = "all") -> list[float]:
    """What the tokens of each message count in the loss: 0 for what others say."""
    weights = [m.weight if m.role == "assistant" else 0.0 for m in conversation.messages]
    return weights if loss_on == "all" else [0.0] * (len(weights) - 1) + weights[-1:]


def encode_turns(
    said: Turns, tokenizer: Tokenizer, group: str | None = None, weights: Sequence[float] | None = None
) -> Example:
    """The same of a conversation that is rendered already; `weights`: of each message, None for 1."""
    pieces = _pieces(said.rendered, tokenizer)
    counts = np.zeros(len(pieces), np.float32)
    for turn in said.turns:
        counts[list(_learned(pieces, said, turn, tokenizer))] = 1.0 if weights is None else weights[turn.message]
    if not counts.any() and (weights is None or any(weights)):
        raise DataError(
            what="a conversation has no token to learn",
            why="the chat template leaves the assistant's words out of the prompt",
            fix="use a base whose template shows assistant messages",
        )
    return _example([i for i, _, _ in pieces], counts, tokenizer, group)


def encode_document(document: Document, tokenizer: Tokenizer) -> Example:
    """The text with BOS in front, if the model's texts have one, and EOS behind it, so that the model learns to end.

    Special-token text in it stays text.
    """
    ids = list(tokenizer.encode(document.text).ids)
    if tokenizer.eos_id is not None:
        ids.append(tokenizer.eos_id)
    return _example(ids, np.ones(len(ids), np.float32), tokenizer)


def encode_tokenized(row: Tokenized, tokenizer: Tokenizer) -> Example:
    """The ids as they are. Raises DataError for ids that are no tokens of this vocabulary."""
    ids, learned = np.array(row.input_ids, np.int64), np.array(row.learned, bool)
    if ids.max() >= len(tokenizer.tokens):
        raise DataError(
            what=f"the id {ids.max()} is no token: the vocabulary has {len(tokenizer.tokens)}",
            why="these ids were made for another model",
            fix="use the data as text, or the base that it was tokenized for",
        )
    return Example(ids, learned)


def _example(ids: list[int], counts: np.ndarray, tokenizer: Tokenizer, group: str | None = None) -> Example:
    whole = _with_bos(ids, tokenizer)
    counts = np.concatenate([np.zeros(len(whole) - len(ids), np.float32), counts])
    learned = counts > 0
    return Example(np.array(whole, np.int64), learned, group, None if (counts == learned).all() else counts)


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


def _pieces(rendered: Rendered, tokenizer: Tokenizer) -> list[Piece]:
    pieces: list[Piece] = []
    for part, start, end in cut(rendered, tokenizer):
        if isinstance(part, int):
            pieces.append((part, start, end))
        else:
            found = tokenizer.encode(part)
            spans = zip(found.ids, found.offsets, strict=True)
            pieces += [(token, start + first, start + last) for token, (first, last) in spans]
    return pieces


def _learned(pieces: list[Piece], said: Turns, turn: Turn, tokenizer: Tokenizer) -> Iterator[int]:
    """Which tokens a turn is: what is said in it and all that the template writes after it, up to its end.

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
        if not around.strip() and not of_the_data:
            yield index


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
