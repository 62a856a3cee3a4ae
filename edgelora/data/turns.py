"""Which characters of a rendered conversation the model must say.

The rule: an assistant's turn is learned from where the generation prompt ends (the text after which the model is asked
to speak) to the last thing that the message says, and on to the token that ends the turn, which is `encode`'s to find.
So wrappers that the template writes within a turn (`<think>`, `{"name": …`, `</tool_call>`) are learned: at
inference nobody else writes them. Whose a turn is tells the origin of its characters, never a search for text.

Three cases need more than the rule:
- A template may write earlier turns otherwise once more follow (Qwen3 takes their thoughts out). Then the end of the
  prompt is found behind the last character that somebody said before, which has the same origin in both renderings: by
  what `add_generation_prompt` adds, in what the template itself wrote there.
- A generation prompt may hold more than the turn does (`<think>` of DeepSeek's distilled models): the turn is learned
  from where the two part.
- A template may ignore `add_generation_prompt` and still write a header (`assistant: `). A header stands before every
  answer, whatever it says, so it is what the template writes before a plain one; it is not learned.

White space at the ends of what a message says is not learned: it is the data's, and most often by accident.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

from edgelora.data.conversation import Conversation, Message
from edgelora.data.rendering.tracked import TEMPLATES_OWN
from edgelora.data.template import ChatTemplate, Rendered, Span
from edgelora.errors import DataError

_BEGUN_MARKER = re.compile(r"[<\[][^<>\[\]]*\Z")  # the beginning of one such as <think> or [INST]


@dataclass(frozen=True)
class Turn:
    """Characters [start, end) of the rendered text are what the assistant says in message number `message`."""

    message: int
    start: int
    end: int


class Turns:
    """A conversation as its template writes it, and the turns in it that the model must say.

    Raises DataError where the template shows nothing of what the assistant says (or of a tool call), or shows it twice
    or in another order.
    """

    def __init__(self, conversation: Conversation, template: ChatTemplate) -> None:
        self._messages, self._tools, self._template = conversation.messages, conversation.tools, template
        self.rendered = template.render(self._messages, tools=self._tools)
        assistants = (i for i, message in enumerate(self._messages) if message.role == "assistant")
        self.turns = [turn for i in assistants if (turn := self._turn(i)) is not None]

    def next_speaker(self, turn: Turn) -> int:
        """Where somebody else has the first word after the turn; the end of the text if nobody has."""
        after = (s.start for s in self.rendered.spans if s.start >= turn.end and s.message != turn.message)
        return next(after, len(self.rendered.text))

    def tail(self, turn: Turn) -> str:
        """What the template writes behind what is said in the turn if nothing follows."""
        alone = self._template.render(self._messages[: turn.message + 1], tools=self._tools)
        return alone.text[_said(alone.origin) :]

    def closed(self, turn: Turn) -> int:
        """Up to where the text behind the turn is that tail, blanks at its end left out."""
        text, after = self.rendered.text, turn.end
        while after < len(text) and text[after].isspace() and self.rendered.origin[after] != TEMPLATES_OWN:
            after += 1
        return max(turn.end, len(text[: after + _common(self.tail(turn), text[after:])].rstrip()))

    def _turn(self, number: int) -> Turn | None:
        spans = _once([span for span in self.rendered.spans if span.message == number], self.rendered.origin)
        _check_shown(number, self._messages[number], spans, self.rendered.origin)
        if not spans:
            return None
        turn = Turn(number, self._start(number, spans[0].start), spans[-1].end)
        others = [s for s in self.rendered.spans if s.message != number and turn.start < s.end and s.start < turn.end]
        if others:
            raise _fault(f"the chat template mixes message {number + 1} with message {others[0].message + 1}")
        return turn

    def _start(self, number: int, first: int) -> int:
        """Where the turn begins whose first said character is at `first`."""
        before, text, origin = self._messages[:number], self.rendered.text, self.rendered.origin
        prompt = self._template.render(before, generation_prompt=True, tools=self._tools)
        start = len(prompt.text)  # in the midst of the content, if the prompt begins it (`<think>`)
        if not text.startswith(prompt.text) or text[start:first].strip():
            added = self._added(before, prompt)
            if not text.startswith(prompt.text):
                start = _where_it_ends(prompt, added, self.rendered, first)
            if not added:
                start += self._header(before, prompt, text[start:first])
        while start < first and text[start].isspace() and origin[start] != TEMPLATES_OWN:
            start += 1
        return start

    def _added(self, before: tuple[Message, ...], prompt: Rendered) -> str:
        """What `add_generation_prompt` adds to a prompt."""
        bare = self._template.render(before, tools=self._tools).text
        return prompt.text[_common(bare, prompt.text) :]

    def _header(self, before: tuple[Message, ...], prompt: Rendered, room: str) -> int:
        """How much of `room`, between a prompt and what is said first, also stands before a plain answer."""
        plain = self._template.render([*before, Message("assistant", "x")], tools=self._tools)
        first = next((span.start for span in plain.spans if span.message == len(before)), 0)
        header = plain.text[_where_it_ends(prompt, "", plain, first) : first]
        return _common(header, room) if header.strip() else 0


def _where_it_ends(prompt: Rendered, added: str, whole: Rendered, first: int) -> int:
    """Where a prompt, which ends with `added`, ends in a text that may begin otherwise: at the latest at `first`, and
    where the two part, before the marker in which they do."""
    said = _said(prompt.origin)
    after = whole.origin.rfind(prompt.origin[said - 1], 0, first) + 1 if said else 0
    if said and not after:
        raise _fault("the chat template writes the end of a prompt otherwise once the answer is there")
    room = whole.text[after:first]
    same = _common(prompt.text[said:], room)
    for length in range(len(added), 0, -1):
        if (found := room.rfind(added[:length])) >= 0:
            same = max(same, found + length)
            break
    if not prompt.text.endswith(room[:same]):
        same = len(_BEGUN_MARKER.sub("", room[:same]))
    return after + same


def _once(spans: list[Span], origin: str) -> list[Span]:
    """Without those that show a tool call again: a template may repeat its name over the tool's answer."""
    shown: set[str] = set()
    out = []
    for span in spans:
        if span.part != "tool_calls" or origin[span.start] not in shown:
            out.append(span)
        shown.add(origin[span.start])
    return out


def _said(origin: str) -> int:
    """How long the text is up to the last character that is not the template's own."""
    return len(origin.rstrip(TEMPLATES_OWN))


def _common(left: str, right: str) -> int:
    """How many characters two texts begin with alike."""
    shorter = min(len(left), len(right))
    return next((i for i in range(shorter) if left[i] != right[i]), shorter)


def _check_shown(number: int, message: Message, spans: list[Span], origin: str) -> None:
    calls_shown = any(span.part == "tool_calls" for span in spans)
    if (message.says_something and not spans) or (message.tool_calls and not calls_shown):
        what = "tool calls" if message.tool_calls else "words"
        raise DataError(
            what=f"message {number + 1} has no token to learn: the chat template leaves out the assistant's {what}",
            why="the loss mask follows what the template shows of each message",
            fix="use a base whose template shows them, or take them out of the data",
        )
    for part in ("content", "reasoning_content"):
        shown = [(origin[s.start], origin[s.end - 1]) for s in spans if s.part == part]
        if any(later[0] <= earlier[1] for earlier, later in pairwise(shown)):
            raise _fault(f"the chat template shows words of message {number + 1} twice or in another order")


def _fault(what: str) -> DataError:
    return DataError(
        what=what,
        why="it cannot be told which of these words the model must learn to say",
        fix="use a base with another chat template",
    )
