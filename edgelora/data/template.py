"""Render a model's own chat template in a sandbox, and know which characters of the prompt are whose.

What messages say goes into the template as `Tracked` text, so the template may do with it what it likes (cut out
thoughts, trim, write it as JSON) and every character that comes out still tells where it came from. What a template
drops is not there, and what nobody could follow is refused. Numbers and truth values have no origin: a number in a tool
call looks like the template's own.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cache, cached_property
from typing import Any

import numpy as np

from edgelora.data.conversation import Message
from edgelora.data.rendering.sandbox import Sandbox
from edgelora.data.rendering.tracked import FIRST_ID, GIVEN, MAX_CHARACTERS, LimitError, Tracked, origin_of
from edgelora.data.tokenizer import Tokenizer
from edgelora.errors import DataError

MAX_SOURCE_CHARACTERS = 100_000  # the longest of a real model has 17,000
OTHER_BASE = "use a base with another chat template"

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a rendered prompt that message number `message` says.

    `part` is the field that they come from: content, reasoning_content or tool_calls.
    """

    message: int
    start: int
    end: int
    part: str = "content"


@dataclass(frozen=True)
class Rendered:
    """A prompt.

    `origin` is as long as `text`: "\\0" where the template wrote a character itself, "\\1" where it comes from a tool's
    description or a variable, and else a character that stands for this one of the messages: the same one in every
    rendering of a conversation that begins with the same messages.
    """

    text: str
    origin: str
    ids: _Ids = field(repr=False, compare=False)

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Who says what in it, white space at their ends left out."""
        return tuple(self.ids.spans(self.text, self.origin))


class ChatTemplate:
    """One Jinja chat template. Raises DataError where it cannot be parsed or refuses a conversation.

    `today` is the day that the template may ask for (None: the real one, another one every day); `variables` are what
    else it may read, such as `enable_thinking`. As in transformers, `tools` and `documents` are None where there are
    none, and everything else is undefined.
    """

    def __init__(
        self, source: str, bos: str = "", eos: str = "", *,
        today: date | None = None, variables: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.source = source
        given = {"documents": None, **(variables or {})}
        self._variables = {"bos_token": bos, "eos_token": eos, **{name: _given(value) for name, value in given.items()}}
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise _fault(f"the chat template does not parse: it has more than {MAX_SOURCE_CHARACTERS} characters")
        try:
            self._template = Sandbox(today).from_string(source)
        except MemoryError:
            raise
        except Exception as e:  # Jinja's, and Python's own: a number of 5000 digits is a ValueError
            raise _fault(f"the chat template does not parse: {e}") from e

    @property
    def tells_the_date(self) -> bool:
        """Whether the prompt may depend on the day: what is trained today is then asked otherwise tomorrow."""
        return "strftime_now" in self.source

    def render(
        self, messages: Sequence[Message], *, generation_prompt: bool = False, tools: Sequence[Mapping[str, Any]] = ()
    ) -> Rendered:
        """The prompt, and whose each character of it is."""
        ids = _Ids()
        try:
            parts = self._parts(
                messages=[ids.track_message(i, m) for i, m in enumerate(messages)],
                tools=[_given(tool) for tool in tools] or None,
                add_generation_prompt=generation_prompt,
            )
        except LimitError as e:
            raise _fault(f"the chat template was stopped: {e}", f"shorten the row, or {OTHER_BASE}") from e
        except MemoryError:
            raise
        except Exception as e:  # a template is a stranger's program: it can raise anything
            raise _fault(
                f"the chat template refused a conversation: {e}", _what_to_do(messages, tools, self.source)
            ) from e
        text = "".join(parts)
        origin = "".join(map(origin_of, parts))
        return Rendered(text, origin, ids)

    def _parts(self, **variables: Any) -> list[str]:
        parts: list[str] = []
        size = 0
        for part in self._template.generate(**self._variables, **variables):
            parts.append(part)
            size += len(part)
            if size > MAX_CHARACTERS:
                raise LimitError(f"it wrote more than {MAX_CHARACTERS} characters")
        return parts


def chatml(tokenizer: Tokenizer) -> str:
    """ChatML as a base without a template of its own can use it.

    Where `<|im_end|>` is no token of the vocabulary, a turn ends with the end-of-sequence token: llama.cpp stops at
    nothing else. Raises DataError where there is none either.
    """
    if "<|im_end|>" in tokenizer.control:
        return CHATML
    if tokenizer.eos_id is None:
        raise DataError(
            what="ChatML needs a token that ends a turn",
            why="this vocabulary has neither <|im_end|> nor an end-of-sequence token, so no answer would ever end",
            fix="use a base model whose vocabulary has one",
        )
    return CHATML.replace("'<|im_end|>'", "eos_token")


class _Ids:
    """Numbers every character that messages say, in order: equal beginnings of conversations get equal numbers."""

    def __init__(self) -> None:
        self._next = FIRST_ID
        self._starts: list[int] = []
        self._owners: list[tuple[int, str]] = []

    def track_message(self, number: int, message: Message) -> dict[str, Any]:
        """The message as templates know it, with only the fields it has."""
        fields: dict[str, Any] = {"role": message.role}
        for part in ("content", "reasoning_content"):
            value = getattr(message, part)
            if value is not None or part == "content":
                fields[part] = self._track(value, number, part)
        if message.tool_calls:
            fields["tool_calls"] = [self._track(call, number, "tool_calls") for call in message.tool_calls]
        if message.tool_call_id is not None:
            fields["tool_call_id"] = _given(message.tool_call_id)
        if message.name is not None:
            fields["name"] = _given(message.name)
        return fields

    def _track(self, value: Any, number: int, part: str) -> Any:
        if isinstance(value, str):
            start, self._next = self._next, self._next + len(value) + 1  # a gap, so that neighbours do not run together
            self._starts.append(start)
            self._owners.append((number, part))
            return Tracked(value, _numbers(start, start + len(value)))
        if isinstance(value, Mapping):
            return {self._track(k, number, part): self._track(v, number, part) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._track(item, number, part) for item in value]
        return value

    def spans(self, text: str, origin: str) -> list[Span]:
        """Runs of characters that stand in a row in `text` as in what was said."""
        ids = np.frombuffer(origin.encode("utf-32-le", "surrogatepass"), np.dtype("<u4")).astype(np.int64)
        steps = np.diff(ids)
        breaks = (np.flatnonzero((steps != 1) & (steps != 0)) + 1).tolist()  # 0: a character that an escape made two
        out = []
        for start, end in zip([0, *breaks], [*breaks, len(text)], strict=True):
            said = text[start:end].strip()
            if said and int(ids[start]) >= FIRST_ID:
                start += len(text[start:end]) - len(text[start:end].lstrip())
                number, part = self._owners[bisect.bisect_right(self._starts, int(ids[start])) - 1]
                out.append(Span(number, start, start + len(said), part))
        return out


@cache
def _all_ids() -> str:
    return np.arange(0x110000, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")


def _numbers(start: int, end: int) -> str:
    if end > 0x110000:
        raise LimitError(f"a conversation of more than {0x110000} characters")
    return _all_ids()[start:end]


def _given(value: Any) -> Any:
    """`value` with every text in it marked as neither the template's nor anybody's words."""
    if isinstance(value, str):
        return Tracked(value, GIVEN * len(value))
    if isinstance(value, Mapping):
        return {_given(k): _given(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_given(item) for item in value]
    return value


def _what_to_do(messages: Sequence[Message], tools: Sequence[object], source: str) -> str:
    """Where a template refuses these: what they have that not every template takes."""
    if any(m.tool_calls and m.content is None for m in messages) and "tool_calls" in source:
        return f'write "" for the `content` that is null beside `tool_calls`, or {OTHER_BASE}'
    if tools or any(m.tool_calls or m.role == "tool" for m in messages):
        return f"take tools, their calls and answers out of the row, or {OTHER_BASE} that knows them"
    roles = [m.role for m in messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if spoken != [("user", "assistant")[i % 2] for i in range(len(spoken))]:
        return f"check the order of roles in your rows (system, user, assistant, user, …), or {OTHER_BASE}"
    if spoken != roles:
        return f"put what `system` says into the first message by `user`, or {OTHER_BASE}"
    return OTHER_BASE


def _fault(what: str, fix: str = OTHER_BASE) -> DataError:
    return DataError(what=what, why="prompts and the loss mask come from the template inside the model file", fix=fix)
