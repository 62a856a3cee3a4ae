"""Render a model's own chat template in a sandbox, and know which characters of the prompt are whose content.

Content is tracked by invisible marks around it. The result must equal a rendering without marks, so a template that
looks inside its messages cannot shift the loss unseen: it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgelora.data.conversation import Message
from edgelora.errors import DataError

MAX_RENDERED_CHARACTERS = 4_000_000

# Unicode's noncharacters: never in real text, no white space, no letters.
OPEN, CLOSE, NUMBER = "\ufdd0", "\ufdd1", 0xF0000


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a rendered prompt that are the content of message number `message`."""

    message: int
    start: int
    end: int


@dataclass(frozen=True)
class Rendered:
    text: str
    spans: tuple[Span, ...]


class ChatTemplate:
    """One Jinja chat template. Raises DataError where it cannot be parsed or refuses a conversation."""

    def __init__(self, source: str, bos: str = "", eos: str = "") -> None:
        self.source, self._bos, self._eos = source, bos, eos
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda fmt: datetime.now().strftime(fmt)
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError) as e:
            raise _fault(f"the chat template does not parse: {e}") from e

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> Rendered:
        """The prompt and where each message's content lies in it (white space at its ends left out)."""
        plain = self._render([(m.role, m.content) for m in messages], generation_prompt)
        marked = self._render([(m.role, _mark(i, m.content)) for i, m in enumerate(messages)], generation_prompt)
        rendered = _unmark(marked)
        if rendered.text != plain:
            raise _fault("the chat template changes its output with what the messages say, beyond quoting them")
        return rendered

    def _render(self, messages: list[tuple[str, str]], generation_prompt: bool) -> str:
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(
                messages=[{"role": role, "content": content} for role, content in messages],
                add_generation_prompt=generation_prompt, bos_token=self._bos, eos_token=self._eos,
            ):  # fmt: skip
                parts.append(part)
                size += len(part)
                if size > MAX_RENDERED_CHARACTERS:
                    raise _fault(f"the chat template wrote more than {MAX_RENDERED_CHARACTERS} characters")
        except DataError:
            raise
        except Exception as e:  # a template is a stranger's program: it can raise anything
            raise _fault(f"the chat template refused a conversation: {e}") from e
        return "".join(parts)


def _mark(number: int, content: str) -> str:
    core = content.strip()
    if not core:
        return content
    start = content.index(core)
    tag = chr(NUMBER + number)
    return f"{content[:start]}{OPEN}{tag}{core}{CLOSE}{tag}{content[start + len(core) :]}"


def _unmark(text: str) -> Rendered:
    out: list[str] = []
    spans: list[Span] = []
    opened: dict[int, int] = {}
    at = size = 0
    while at < len(text):
        if text[at] in (OPEN, CLOSE) and at + 1 < len(text) and ord(text[at + 1]) >= NUMBER:
            number = ord(text[at + 1]) - NUMBER
            if text[at] == OPEN:
                opened[number] = size
            elif number in opened:
                spans.append(Span(number, opened.pop(number), size))
            else:
                raise _fault("the chat template shows only a part of a message")
            at += 2
            continue
        end = min((i for i in (text.find(OPEN, at + 1), text.find(CLOSE, at + 1)) if i > at), default=len(text))
        out.append(text[at:end])
        size += end - at
        at = end
    if opened:
        raise _fault("the chat template shows only a part of a message")
    return Rendered("".join(out), tuple(spans))


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)  # as HF's templates expect: no HTML escapes


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _fault(what: str) -> DataError:
    return DataError(
        what=what,
        why="prompts and the loss mask come from the template inside the model file",
        fix="check the order of roles in your rows (system, user, assistant, user, …), or use another base",
    )
