"""Rows out of a JSON file, one at a time: arrays of them, objects that hold these, or one object after another.

Holds no more of the file than the row it is at, so a file may be larger than memory.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Collection, Generator, Iterator
from itertools import chain
from typing import IO, Any

CHUNK = 1 << 16  # characters
NEAR_THE_END = 16  # what the end of the text read so far may have cut: an escape, `false`, the `.5` of a number
_DECODER = json.JSONDecoder()
_BLANKS = re.compile(r"[ \t\r\n]*")


def json_rows(file: IO[str], row_keys: Collection[str]) -> Iterator[tuple[int, Any]]:
    """Each row of a seekable file with the line where it begins. Raises NoMoreRowsError at what is none.

    `row_keys`: an object that has one of them is a row. An object at the top that is none holds the rows in a list.
    Arrays, and objects that hold rows, may follow one another: files that were joined.
    """
    values = _Values(file)
    first, are_rows = True, False  # objects at the top are rows themselves
    while begin := values.peek():
        line = values.line
        if begin == "[":
            yield from values.items()
        elif begin != "{" or are_rows:
            yield line, values.value()
        elif not (yield from _rows_within(values, row_keys)):
            if not first:
                raise NoMoreRowsError(line, "this object holds no list of rows: put it into a list, as those before it")
            file.seek(0)
            values, are_rows = _Values(file), True
        first = False


def _rows_within(values: _Values, row_keys: Collection[str]) -> Generator[tuple[int, Any], None, bool]:
    """The list in the object that comes next whose first item is a row. Returns whether there is one, and then has read
    the object to its end; one that is a row itself only in part."""

    def is_row(item: Any) -> bool:
        return isinstance(item, dict) and not item.keys().isdisjoint(row_keys)

    holder: str | None = None
    for line, key in values.names():
        if key in row_keys:
            if holder is None:
                return False
            raise NoMoreRowsError(
                line,
                f"`{holder}` holds rows, and `{key}` beside it makes the object one: keep one, or put it into a list",
            )
        if values.peek() != "[":
            values.value()
            continue
        items = values.items()
        if holder is not None:
            if any(is_row(item) for _, item in items):
                raise NoMoreRowsError(line, f"`{holder}` and `{key}` both hold rows: split the file, a list in each")
        elif (first := next(items, None)) and is_row(first[1]):
            holder = key
            yield from chain([first], items)
        else:
            deque(items, maxlen=0)
    return holder is not None


class NoMoreRowsError(ValueError):
    """Where in a file no row can be told from there on: in which line, and why."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


class NotJSONError(NoMoreRowsError):
    """What is not JSON, and in which line of the file."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(line, f"not JSON from here on: {reason}")


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

    def names(self) -> Iterator[tuple[int, str]]:
        """The keys of the object that comes next, each with its line; whoever takes one reads its value."""
        self.take("{")
        while self.peek() != "}":
            if self.peek() != '"':
                raise NotJSONError(self.line, f"expected a key, found {self.peek() or 'the end of the file'}")
            line, key = self.line, self.value()
            self.take(":")
            yield line, key
            if self.peek() != "}":
                self.take(",")
        self.take("}")

    def _read(self, size: int) -> None:
        more = self._file.read(size)
        self._ended = not more
        self._text, self._at = self._text[self._at :] + more, 0

    def _skip(self, to: int) -> None:
        self.line += self._text.count("\n", self._at, to)
        self._at = to
