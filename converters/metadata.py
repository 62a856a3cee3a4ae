"""Copy a GGUF's metadata into a writer, with the types it had. Used wherever a base becomes another file."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import gguf
from gguf.constants import GGUFValueType

from edgelora.files.gguf import GGUFFile, Strings, Value

# The writer states these itself; it always aligns to 32 bytes.
WRITERS_OWN = ("general.architecture", "general.alignment")


def copy_metadata(file: GGUFFile, writer: gguf.GGUFWriter, leave_out: Container[str] = ()) -> None:
    """Every key but those of `leave_out`, in the file's order."""
    for key, value in file.metadata.items():
        empty = value.type == GGUFValueType.ARRAY and not len(value.data)  # the writer cannot write one
        if key not in WRITERS_OWN and key not in leave_out and not empty:
            writer.add_key_value(key, _plain(value), value.type, value.item)


def _plain(value: Value) -> Any:
    if value.type != GGUFValueType.ARRAY:
        return value.data
    if isinstance(value.data, Strings):
        return [value.data.raw(i) for i in range(len(value.data))]
    return value.data.tolist()
