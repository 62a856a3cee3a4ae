"""Chat templates as ollama has them: Go's text/template, the part of it that families of templates need.

Written from a table of families, and rendered here as Go would, so that what ollama will say to a model can be held
against the model's own Jinja template. ollama hands over `.System` (all system messages) and `.Messages` (neighbours of
one role joined), and puts the BOS token in front itself where the vocabulary asks for one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ACTION = re.compile(r"\{\{(?P<left>- )?\s*(?P<code>.*?)\s*(?P<right> -)?\}\}", re.DOTALL)
WORD = re.compile(r'"(?:[^"\\]|\\.)*"|\(|\)|[^\s()]+')


@dataclass(frozen=True)
class Family:
    """`turns`: what stands before and behind what each role says. The assistant speaks behind `ask`."""

    name: str
    turns: Mapping[str, tuple[str, str]]
    ask: str
    joins_system: str | None = None
    """No system role: its words begin the first user's turn, and this stands between the two."""


def _family(name: str, before: str, after: str, roles: Mapping[str, str] | None = None, **more: Any) -> Family:
    names = roles or {"system": "system", "user": "user", "assistant": "assistant"}
    turns = {role: (before.format(said), after) for role, said in names.items()}
    return Family(name, turns, turns["assistant"][0], **more)


GEMMA = {"user": "user", "assistant": "model"}

# THE TABLE: every entry is tried, and the one that renders what the model's own template renders is used.
FAMILIES: tuple[Family, ...] = (
    _family("ChatML", "<|im_start|>{}\n", "<|im_end|>\n"),
    _family("Llama 3", "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"),
    _family("Gemma", "<start_of_turn>{}\n", "<end_of_turn>\n", GEMMA, joins_system="\n\n"),
    _family("Phi-3", "<|{}|>\n", "<|end|>\n"),
    _family("Zephyr", "<|{}|>\n", "</s>\n"),
    _family("Granite 3", "<|start_of_role|>{}<|end_of_role|>", "<|end_of_text|>\n"),
)


def go_template(family: Family, default_system: str | None = None, start: str = "") -> str:
    """The template of a family. `default_system` is said where nobody says anything else, `start` before all."""
    text = _literal(start)
    if default_system is not None:
        before, after = family.turns["system"]
        text += "{{ if not .System }}" + before + _literal(default_system) + after + "{{ end }}"
    cases = []
    for role, (before, after) in family.turns.items():
        if role == "user" and family.joins_system is not None:  # the system's words have begun this turn
            before = "{{ if not (and $.System (eq $i 1)) }}" + before + "{{ end }}"
        cases.append(f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}')
    if family.joins_system is not None:
        opening = family.turns["user"][0] + "{{ .Content }}" + family.joins_system
        cases.append(f'if eq .Role "system" }}}}{opening}')
    return text + "{{ range $i, $_ := .Messages }}{{ " + "{{ else ".join(cases) + "{{ end }}{{ end }}" + family.ask


def _literal(text: str) -> str:
    """A text as it is: two braces, or one before an action, would begin another."""
    return re.sub(r"\{+", lambda braces: '{{ "' + braces[0] + '" }}', text)


def render(source: str, messages: Sequence[tuple[str, str]]) -> str:
    """What ollama makes of (role, content) pairs. Raises ValueError for what is beyond this part of Go's language."""
    system = "\n\n".join(content for role, content in messages if role == "system")
    joined: list[dict[str, str]] = []
    for role, content in messages:
        if joined and joined[-1]["Role"] == role:
            joined[-1]["Content"] += f"\n\n{content}"
        else:
            joined.append({"Role": role, "Content": content})
    root = {"System": system, "Messages": joined}
    parts = _parts(source)
    body, ended = _block(parts)
    if ended is not None:
        raise ValueError(f"{{{{ {ended} }}}} without a beginning")
    return "".join(body({".": root, "$": root}))


Scope = dict[str, Any]
Body = Callable[[Scope], list[str]]


def _parts(source: str) -> Iterator[tuple[bool, str]]:
    """(is an action, text), white space trimmed where `{{- ` or ` -}}` says so."""
    at, trim = 0, False
    for found in ACTION.finditer(source):
        text = source[at : found.start()]
        text = text.lstrip() if trim else text
        yield False, text.rstrip() if found["left"] else text
        yield True, found["code"]
        at, trim = found.end(), bool(found["right"])
    yield False, source[at:].lstrip() if trim else source[at:]


def _block(parts: Iterator[tuple[bool, str]]) -> tuple[Body, str | None]:
    """Everything up to an `else` or `end`, and which of them it was (None: the end of the text)."""
    nodes: list[Body] = []
    ended = None
    for is_action, text in parts:
        if not is_action:
            nodes.append(lambda _, text=text: [text])  # type: ignore[misc]
            continue
        word, _, rest = text.partition(" ")
        if word in ("else", "end"):
            ended = text
            break
        if word == "if":
            nodes.append(_if(rest, parts))
        elif word == "range":
            nodes.append(_range(rest, parts))
        else:
            nodes.append(lambda scope, text=text: [str(_value(text, scope))])  # type: ignore[misc]
    return lambda scope: [part for node in nodes for part in node(scope)], ended


def _if(condition: str, parts: Iterator[tuple[bool, str]]) -> Body:
    then, ended = _block(parts)
    otherwise: Body = lambda _: []  # noqa: E731
    if ended == "else":
        otherwise, ended = _block(parts)
    elif ended is not None and ended.startswith("else if "):
        otherwise, ended = _if(ended.removeprefix("else if "), parts), "end"
    if ended != "end":
        raise ValueError(f"{{{{ if {condition} }}}} has no end")
    return lambda scope: (then if _value(condition, scope) else otherwise)(scope)


def _range(what: str, parts: Iterator[tuple[bool, str]]) -> Body:
    variables, assigned, items = what.rpartition(":=")
    names = [name.strip() for name in variables.split(",")] if assigned else []
    body, ended = _block(parts)
    if ended != "end" or len(names) not in (0, 2):
        raise ValueError(f"{{{{ range {what} }}}} has no end, or other than two variables")

    def run(scope: Scope) -> list[str]:
        out = []
        for i, item in enumerate(_value(items, scope)):
            out += body({**scope, ".": item, **dict(zip(names, (i, item), strict=False))})
        return out

    return run


def _value(code: str, scope: Scope) -> Any:
    words = WORD.findall(code)
    value = _call(words, scope)
    if words:
        raise ValueError(f"{{{{ {code} }}}} is beyond this part of the language")
    return value


def _call(words: list[str], scope: Scope) -> Any:
    """A function and its arguments, or one value; takes its words from the list."""
    name = words.pop(0)
    if name not in ("eq", "ne", "and", "or", "not", "len"):
        return _one(name, words, scope)
    given = []
    while words and words[0] != ")":
        given.append(_one(words.pop(0), words, scope))
    match name:
        case "not":
            return not given[0]
        case "len":
            return len(given[0])
        case "eq":
            return given[0] == given[1]
        case "ne":
            return given[0] != given[1]
        case "and":
            return next((value for value in given if not value), given[-1])
        case _:
            return next((value for value in given if value), given[-1])


def _one(word: str, words: list[str], scope: Scope) -> Any:
    if word == "(":
        value = _call(words, scope)
        if not words or words.pop(0) != ")":
            raise ValueError("a parenthesis is not closed")
        return value
    if word.startswith('"'):
        return json.loads(word)
    if word.isdigit():
        return int(word)
    owner, dot, field = word.partition(".")
    if dot and owner in ("", "$"):
        found = scope[owner or "."]
        return found.get(field, "") if field else found
    if word in scope:
        return scope[word]
    raise ValueError(f"{word} is beyond this part of the language")
