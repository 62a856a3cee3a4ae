"""Rows out of a JSON file, one at a time: an array of them, an object that holds it, or one object after another.

Holds no more of the file than the row it is at, so a file may be larger than memory.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Collection, Iterator
from itertools import chain
from typing import IO, Any

CHUNK = 1 << 16  # characters
NEAR_THE_END = 16  # what the end of the text read so far may have cut: an escape, `false`, the `.5` of a number
_DECODER = json.JSONDecoder()
_BLANKS = re.compile(r"[ \t\r\n]*")


def json_rows(file: IO[str], row_keys: Collection[str]) -> Iterator[tuple[int, Any]]:
    """Each row of a seekable file with the line where it begins. Raises NotJSONError at what is not JSON.

    `row_keys`: an object that has one of them is a row. An object at the top that is none holds the rows in a list.
    """
    values = _Values(file)
    if values.peek() == "[":
        yield from values.items()
        return
    if values.peek() == "{" and (rows := _list_of_rows(values, row_keys)):
        yield from rows
        return
    file.seek(0)
    values = _Values(file)
    while values.peek():
        line = values.line
        yield line, values.value()


def _list_of_rows(values: _Values, row_keys: Collection[str]) -> Iterator[tuple[int, Any]] | None:
    """The list in the object that comes next whose first item is a row, or None if the object is a row itself."""
    values.take("{")
    while values.peek() == '"':
        key = values.value()
        values.take(":")
        if key in row_keys:
            return None
        if values.peek() == "[":
            items = values.items()
            first = next(items, None)
            if first and isinstance(first[1], dict) and not first[1].keys().isdisjoint(row_keys):
                return chain([first], items)  # what follows the rows is about them, and no row
            deque(items, maxlen=0)
        else:
            values.value()
        if values.peek() == ",":
            values.take(",")
    return None


class NotJSONError(ValueError):
    """What is not JSON, and in which line of the file."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"not JSON from here on: {reason}")
        self.line = line


class _Values:
    """Reads JSON values one after another. `line`: where the next one begins, once `peek` has been asked."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self._text, self._at, self._ended = file, "", 0, False
        self.line = 1

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            blanks = _BLANKS.match(self._text, self._at)
            self._skip(blanks.end() if blanks else self._at)
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read(CHUNK)

    def take(self, expected: str) -> None:
        if self.peek() != expected:
            raise NotJSONError(self.line, f"expected {expected}, found {self.peek() or 'the end of the file'}")
        self._skip(self._at + 1)

    def value(self) -> Any:
        """The next value."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as e:
                cut = e.msg.startswith("Unterminated string") or e.pos >= len(self._text) - NEAR_THE_END
                if self._ended or not cut:
                    raise NotJSONError(self.line + self._text.count("\n", self._at, e.pos), e.msg) from e
            except RecursionError as e:
                raise NotJSONError(self.line, "nested too deeply") from e
            else:
                if end + NEAR_THE_END <= len(self._text) or self._ended:  # else it may be a number that goes on
                    self._skip(end)
                    return value
            self._read(max(CHUNK, len(self._text)))  # twice as much: long rows cost no more than short ones

    def items(self) -> Iterator[tuple[int, Any]]:
        """The values of the array that comes next."""
        self.take("[")
        while self.peek() != "]":
            line = self.line
            yield line, self.value()
            if self.peek() != "]":
                self.take(",")
        self.take("]")

    def _read(self, size: int) -> None:
        more = self._file.read(size)
        self._ended = not more
        self._text, self._at = self._text[self._at :] + more, 0

    def _skip(self, to: int) -> None:
        self.line += self._text.count("\n", self._at, to)
        self._at = to
