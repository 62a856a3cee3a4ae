"""A file of conversations, read whole: what is scored, checked or shown row by row is small."""

from __future__ import annotations

from pathlib import Path

from edgelora.data.formats import DATA_FORMATS, DataFormat
from edgelora.data.rows import Conversation, Message
from edgelora.data.sources import Faults, read_rows

__all__ = ["DATA_FORMATS", "Conversation", "DataFormat", "Message", "read_conversations"]


def read_conversations(path: Path) -> list[Conversation]:
    """Read every row of a file or folder, whatever its format, as a conversation.

    Raises DataError with up to 20 broken lines at once, and for rows that are no conversations.
    """
    rows: list[Conversation] = []
    others = Faults(path, "row", "what is asked for here is conversations, and these are rows of another kind")
    for place, name, row in read_rows(path):
        if isinstance(row, Conversation):
            rows.append(row)
        else:
            others.add(place, f"a row of the format {name}, not a conversation")
    others.report()
    return rows
