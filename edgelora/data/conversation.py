"""Conversations and the files that hold them. All faults of a file are reported at once, with their lines."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora.errors import DataError

MAX_FAULTS_SHOWN = 20
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn, with the fields of OpenAI's chat format. `content` is None only where `tool_calls` say all there is.

    A tool call is `{"function": {"name": …, "arguments": {…}}, …}`; the template gets it as it stands here.
    """

    role: str
    content: str | None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    reasoning_content: str | None = None


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


def common_system(rows: Sequence[Conversation]) -> str | None:
    """The system message that all rows begin with, or None if they have none or several."""
    found = {row.messages[0].content if row.messages[0].role == "system" else None for row in rows}
    return found.pop() if len(found) == 1 else None


def parse_chat(row: Mapping[str, Any]) -> Conversation:
    """`{"messages": [{"role", "content"}, …]}`, OpenAI's chat format. Raises ValueError with the reason."""
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError("`messages` is not a list with at least one message")
    parsed = tuple(_parse_message(m) for m in messages)
    last = parsed[-1]
    if last.role != "assistant" or not ((last.content or "").strip() or last.tool_calls):
        raise ValueError("no assistant turn to learn: the last message must be a non-empty one by `assistant`")
    group = row.get("group")
    if group is not None and not isinstance(group, str):
        raise ValueError("`group` is not a text")
    return Conversation(parsed, group, _functions(row.get("tools"), "tools"))


def _parse_message(m: Any) -> Message:
    if not isinstance(m, dict) or m.get("role") not in ROLES:
        raise ValueError(f"every message needs a `role` ({', '.join(ROLES)}) and a text `content`")
    calls = tuple(_with_object(call) for call in _functions(m.get("tool_calls"), "tool_calls"))
    if not isinstance(m.get("content"), str) and not (calls and m.get("content") is None):
        raise ValueError("every message needs a `role` and a text `content` (null only beside `tool_calls`)")
    for field, role in (("tool_calls", "assistant"), ("reasoning_content", "assistant"), ("tool_call_id", "tool")):
        if m.get(field) and m["role"] != role:
            raise ValueError(f"`{field}` in a message by `{m['role']}`: only one by `{role}` has it")
    for field in ("content", "tool_call_id", "name", "reasoning_content"):
        if m.get(field) is not None and not isinstance(m[field], str):
            raise ValueError(f"`{field}` is not a text")
        _check_unicode(m.get(field), field)
    return Message(m["role"], m.get("content"), calls, m.get("tool_call_id"), m.get("name"), m.get("reasoning_content"))


def _functions(value: Any, field: str) -> tuple[Mapping[str, Any], ...]:
    """A list of `{"function": {"name": …}}`, as both `tools` and `tool_calls` are."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ValueError(f"`{field}` is not a list")
    for item in value:
        function = item.get("function") if isinstance(item, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise ValueError(
                f'every item of `{field}` needs the form {{"type": "function", "function": {{"name": …}}}}'
            )
    _check_unicode(value, field)
    return tuple(value)


def _with_object(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """The call with its arguments as an object: OpenAI sends them as JSON in a text, templates expect the object."""
    arguments = call["function"].get("arguments", {})
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("the `arguments` of a tool call are neither an object nor one written as JSON")
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _check_unicode(value: Any, field: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        raise ValueError(
            f"half of a surrogate pair (\\ud83d …) in a `{field}`: no text, and no tokenizer reads it"
        ) from e
    except RecursionError as e:
        raise ValueError("nested too deeply") from e


@dataclass(frozen=True)
class DataFormat:
    """How rows of one kind are recognised (by a key) and read."""

    key: str
    parse: Callable[[Mapping[str, Any]], Conversation]


DATA_FORMATS: dict[str, DataFormat] = {"chat": DataFormat("messages", parse_chat)}


def _parse_line(line: str) -> Conversation:
    try:
        row = json.loads(line)
    except RecursionError as e:
        raise ValueError("nested too deeply") from e
    if not isinstance(row, dict):
        raise ValueError("a row must be a JSON object")
    for known in DATA_FORMATS.values():
        if known.key in row:
            return known.parse(row)
    raise ValueError(f"none of the keys {', '.join(f.key for f in DATA_FORMATS.values())} is in this row")


def read_conversations(path: Path) -> list[Conversation]:
    """Read a JSONL file, a conversation a line. Raises DataError with up to 20 broken lines at once."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors put a mark in front
    except UnicodeDecodeError as e:
        raise DataError(
            what=f"{path}: not a text file in UTF-8", why=str(e.reason), fix="convert the file to UTF-8"
        ) from e
    except OSError as e:
        raise DataError(
            what=f"{path}: cannot be read ({e.strerror})",
            why="the path is wrong, or is not a file",
            fix="check the spelling of the path",
        ) from e
    rows: list[Conversation] = []
    faults: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(_parse_line(line))
            except ValueError as e:
                faults.append(f"{path}:{number}: {e}")
    if faults:
        more = f"\n  … and {len(faults) - MAX_FAULTS_SHOWN} more" if len(faults) > MAX_FAULTS_SHOWN else ""
        raise DataError(
            what=f"{path}: {len(faults)} broken line{'s' * (len(faults) > 1)}\n  "
            + "\n  ".join(faults[:MAX_FAULTS_SHOWN]) + more,
            why='each line must be a JSON object like {"messages": [{"role": "user", "content": "…"}, …]}',
            fix="mend these lines or take them out",
        )  # fmt: skip
    if not rows:
        raise DataError(
            what=f"{path}: no rows in it", why="the file is empty", fix="pass a JSONL file with one row a line"
        )
    return rows
