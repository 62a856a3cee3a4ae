"""A conversation in a file, in OpenAI's chat format: what was said is data to train on, and a chat to go on with."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from edgelora.data.conversation import Message, read_conversations
from edgelora.errors import ConfigError, DataError, OutputError
from edgelora.files.atomic import write_text


def write_transcript(path: Path, messages: Sequence[Message], system: str | None) -> int:
    """Write the conversation, behind the system message it was had with; returns how many rows the file then has.

    A `.jsonl` file gets it as one more row; any other must not exist yet. Raises ConfigError for an empty
    conversation, OutputError for a file that cannot be written.
    """
    if not messages:
        raise ConfigError("a conversation of no messages", "nothing was said yet", "ask something first")
    said = [*([Message("system", system)] if system else []), *messages]
    row = json.dumps({"messages": [_as_json(m) for m in said]}, ensure_ascii=False)
    if path.suffix != ".jsonl":
        write_text(path, row + "\n")
        return 1
    earlier = len(read_conversations(path)) if path.exists() and path.stat().st_size else 0
    try:
        with path.open("a+b") as file:
            end = file.seek(0, os.SEEK_END)
            whole = end == 0 or os.pread(file.fileno(), 1, end - 1) == b"\n"
            file.write(("" if whole else "\n").encode() + row.encode() + b"\n")
    except OSError as e:
        raise OutputError(
            f"{path}: cannot write here ({e.strerror})", "the folder is missing, read-only or full", "choose another"
        ) from e
    return earlier + 1


def read_transcript(path: Path) -> tuple[Message, ...]:
    """The messages of the last row. Raises DataError for a file of anything else."""
    last = read_conversations(path)[-1]
    if last.tools:
        raise DataError(
            what=f"{path}: a conversation with tools",
            why="a chat here has no tools, and the model would be asked otherwise than it was",
            fix="choose another conversation",
        )
    return last.messages


def _as_json(message: Message) -> dict[str, object]:
    """The message with only the fields it has."""
    rest = {"tool_calls": list(message.tool_calls), "tool_call_id": message.tool_call_id, "name": message.name,
            "reasoning_content": message.reasoning_content}  # fmt: skip
    return {"role": message.role, "content": message.content, **{name: value for name, value in rest.items() if value}}
