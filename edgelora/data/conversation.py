"""Conversations and the files that hold them. All faults of a file are reported at once, with their lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora.errors import DataError

MAX_FAULTS_SHOWN = 20
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Messages in order. `group` sorts held-out rows into parts that a report scores apart (None: no parts)."""

    messages: tuple[Message, ...]
    group: str | None = None

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the last message, which is the assistant's."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1].content


def common_system(rows: Sequence[Conversation]) -> str | None:
    """The system message that all rows begin with, or None if they have none or several."""
    found = {row.messages[0].content if row.messages[0].role == "system" else None for row in rows}
    return found.pop() if len(found) == 1 else None


def parse_chat(row: Mapping[str, Any]) -> Conversation:
    """`{"messages": [{"role", "content"}, …]}`, OpenAI's chat format. Raises ValueError with the reason."""
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError("`messages` is not a list with at least one message")
    for m in messages:
        if not isinstance(m, dict) or m.get("role") not in ROLES or not isinstance(m.get("content"), str):
            raise ValueError(f"every message needs a `role` ({', '.join(ROLES)}) and a text `content`")
        if any("\ud800" <= c <= "\udfff" for c in m["content"]):
            raise ValueError("half of a surrogate pair (\\ud83d …) in a `content`: no text, and no tokenizer reads it")
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise ValueError("no assistant turn to learn: the last message must be a non-empty one by `assistant`")
    group = row.get("group")
    if group is not None and not isinstance(group, str):
        raise ValueError("`group` is not a text")
    return Conversation(tuple(Message(m["role"], m["content"]) for m in messages), group)


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
