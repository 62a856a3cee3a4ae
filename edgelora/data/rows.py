"""What a row of data can be: a conversation, a document, two answers to prefer from, a rated answer, or token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn, with the fields of OpenAI's chat format. `content` is None only where `tool_calls` say all there is.

    A tool call is `{"function": {"name": …, "arguments": {…}}, …}`; the template gets it as it stands here. `weight`
    is that of the turn's tokens in the loss: 0 for a turn that is read but not learned.
    """

    role: str
    content: str | None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    reasoning_content: str | None = None
    weight: float = 1.0

    @property
    def says_something(self) -> bool:
        """Whether there is a word, a thought or a call in it."""
        return bool((self.content or "").strip() or (self.reasoning_content or "").strip() or self.tool_calls)


@dataclass(frozen=True)
class Conversation:
    """Messages in order. `group` sorts held-out rows into parts that a report scores apart (None: no parts).

    `tools` describe the functions that the model may call, each `{"type": "function", "function": {…}}`.
    """

    messages: tuple[Message, ...]
    group: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the last message, which is the assistant's."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """What the assistant says last, without its tool calls."""
        return self.messages[-1].content or ""


@dataclass(frozen=True)
class Document:
    """A text that is learned whole."""

    text: str


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt (DPO, IPO, ORPO). The turns of the prompt have weight 0: only the answers differ."""

    chosen: Conversation
    rejected: Conversation


@dataclass(frozen=True)
class Rated:
    """One answer and whether it is one to give (KTO). The turns of the prompt have weight 0."""

    conversation: Conversation
    desirable: bool


@dataclass(frozen=True)
class Tokenized:
    """Ids as somebody else made them; `learned` says which of them count in the loss."""

    input_ids: tuple[int, ...]
    learned: tuple[bool, ...]


Row: TypeAlias = Conversation | Document | Preference | Rated | Tokenized


def unlearned(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages as they are read and not learned."""
    return tuple(replace(m, weight=0.0) if m.role == "assistant" else m for m in messages)


def conversation_of(row: Row) -> Conversation | None:
    """The conversation that a row is or holds, the chosen one of two; None if it holds none."""
    if isinstance(row, Preference):
        return row.chosen
    if isinstance(row, Rated):
        return row.conversation
    return row if isinstance(row, Conversation) else None
