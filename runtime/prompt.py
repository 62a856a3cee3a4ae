"""What was asked → the ids to evaluate, checked against the vocabulary and the room of a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from edgelora.base.model import Base
from edgelora.data.conversation import Message
from edgelora.data.encode import encode_prompt
from edgelora.errors import ConfigError, DataError, EngineError
from runtime.service import Prompt


def prompt_ids(prompt: Prompt, base: Base, room: int) -> list[int]:
    """A conversation in the base's template, a text (its special tokens are read) with the BOS it wants, or ids.

    Raises DataError for what cannot be tokenized, EngineError if nothing is left of `room` to answer in.
    """
    ids = _ids(prompt, base)
    if not ids:
        raise DataError("an empty prompt", "a model continues something: there is nothing", "pass a text")
    require_room(len(ids), room)
    return ids


def require_room(tokens: int, room: int) -> None:
    """Raises EngineError if nothing is left to answer in."""
    if tokens >= room:
        raise EngineError(
            what=f"a prompt of {tokens} tokens",
            why=f"a conversation has room for {room} here, its answer included",
            fix="shorten the conversation, or open with a larger --context",
        )


def _ids(prompt: Prompt, base: Base) -> list[int]:
    if isinstance(prompt, str):
        _require_unicode(prompt)
        tokenizer = base.tokenizer
        begin = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
        return begin + tokenizer.encode(prompt, parse_special=True).ids
    if prompt and all(isinstance(part, Message) for part in prompt):
        messages = cast(Sequence[Message], prompt)
        for message in messages:
            _require_text(message)
        return encode_prompt(messages, base.tokenizer, base.template)
    n = len(base.tokenizer.tokens)
    for token in prompt:
        if not isinstance(token, int) or not 0 <= token < n:
            raise DataError(f"the token {token!r}", f"the vocabulary has ids from 0 to {n - 1}", "pass such ids")
    return [int(token) for token in cast(Sequence[int], prompt)]


def _require_text(message: Message) -> None:
    """Whatever of a message a template may print."""
    if not isinstance(message.role, str) or not isinstance(message.content, str | None):
        raise DataError(
            what=f"a message of {message.role!r} whose content is {message.content!r}",
            why="a role is a text, and so is what is said; only a turn that calls tools may say nothing",
            fix="pass texts",
        )
    waiting: list[object] = list(vars(message).values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            _require_unicode(value)
        elif isinstance(value, Mapping):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            waiting += value


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise DataError(
            what=f"a text with half a character: {e.object[e.start : e.end]!r} at {e.start}",
            why="surrogates stand for a character in pairs only; alone they have no bytes",
            fix="decode the text with errors='replace' where it comes from",
        ) from e


def require_limits(max_tokens: int) -> None:
    """Raises ConfigError. (More than the context holds is no fault: the context ends the answer.)"""
    if max_tokens < 1:
        raise ConfigError(f"max_tokens {max_tokens}", "an answer has at least one token", "ask for 1 or more")
