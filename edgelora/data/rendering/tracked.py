"""Text that knows where each of its characters comes from, through every operation a chat template may do to it.

Beside the text stands its origin: a string of the same length, whose character n tells whose the text's character n
is. So an operation on text is the same operation on its origin, at C speed. Knows nothing of Jinja.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import SupportsIndex

TEMPLATES_OWN = "\0"  # the template wrote this character itself
GIVEN = "\x01"  # part of a tool's description, a document or a variable: not the template's, and nobody says it
FIRST_ID = 3  # from here on every character that a message says has an id of its own

MAX_CHARACTERS = 2_000_000  # of any one text
MAX_ITEMS = 100_000  # of any one list

_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


class LimitError(ValueError):
    """A template that makes or does more than any prompt needs."""


class UntrackableError(ValueError):
    """An operation after which nobody could say whose the characters are."""


class Tracked(str):
    """A text and its origin. Every method that a template may call keeps both together (`METHODS`)."""

    __slots__ = ("origin",)
    origin: str

    def __new__(cls, text: str, origin: str) -> Tracked:
        self = super().__new__(cls, text)
        self.origin = origin
        return self

    def __str__(self) -> str:  # so that str(x), which Jinja's code is full of, loses nothing
        return self

    def __getitem__(self, index: SupportsIndex | slice) -> Tracked:
        return Tracked(super().__getitem__(index), self.origin[index])

    def __iter__(self) -> Iterator[Tracked]:
        return (Tracked(c, o) for c, o in zip(super().__iter__(), self.origin, strict=True))

    def __add__(self, other: str) -> str:
        return _added(self, other) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return _added(other, self) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> str:
        check_size(len(self) * max(int(times), 0))
        return Tracked(super().__mul__(times), self.origin * times)

    __rmul__ = __mul__

    def _between(self, start: int, stop: int) -> Tracked:
        return Tracked(str.__getitem__(self, slice(start, stop)), self.origin[start:stop])

    def _found(self, pieces: list[str], gap: int) -> list[str]:
        """The pieces that str's own method cut out, with their origins; each begins `gap` behind the one before."""
        out: list[str] = []
        at = 0
        for piece in pieces:
            out.append(self._between(at, at + len(piece)))
            at += len(piece) + gap
        return out

    def strip(self, chars: str | None = None, /) -> Tracked:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> Tracked:
        return self._between(len(self) - len(super().lstrip(chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> Tracked:
        return self._between(0, len(super().rstrip(chars)))

    def removeprefix(self, prefix: str, /) -> Tracked:
        return self._between(len(self) - len(super().removeprefix(prefix)), len(self))

    def removesuffix(self, suffix: str, /) -> Tracked:
        return self._between(0, len(super().removesuffix(suffix)))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._split(super().split, sep, maxsplit)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._split(super().rsplit, sep, maxsplit)

    def _split(self, split: Callable[..., list[str]], sep: str | None, maxsplit: SupportsIndex) -> list[str]:
        pieces = split(sep, MAX_ITEMS if int(maxsplit) < 0 else min(int(maxsplit), MAX_ITEMS))
        check_items(len(pieces))
        if sep is not None:
            return self._found(pieces, len(sep))
        out: list[str] = []
        at = 0
        for piece in pieces:
            at = self.index(piece, at)  # only white space stands before it
            out.append(self._between(at, at + len(piece)))
            at += len(piece)
        return out

    def splitlines(self, keepends: bool = False) -> list[str]:
        check_items(sum(self.count(c) for c in _LINE_ENDS))
        lines = self._found(super().splitlines(True), 0)
        if keepends:
            return lines
        bare = super().splitlines(False)
        return [line[: len(short)] for line, short in zip(lines, bare, strict=True)]

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        before, found, _ = super().partition(sep)
        middle = len(before) + len(found)
        return self._between(0, len(before)), self._between(len(before), middle), self._between(middle, len(self))

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        before, found, _ = super().rpartition(sep)
        middle = len(before) + len(found)
        return self._between(0, len(before)), self._between(len(before), middle), self._between(middle, len(self))

    def join(self, parts: Iterable[str], /) -> str:
        return joined(*parts, between=self)

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        return joined(*self.split(old, count), between=new)

    def upper(self) -> Tracked:
        return self.recased(super().upper())

    def lower(self) -> Tracked:
        return self.recased(super().lower())

    def title(self) -> Tracked:
        return self.recased(super().title())

    def capitalize(self) -> Tracked:
        return self.recased(super().capitalize())

    def recased(self, text: str) -> Tracked:
        """`text`, which is this one in other letters. Raises UntrackableError where ß has become SS."""
        if len(text) != len(self):
            raise UntrackableError("a change of case made the text longer, so that its letters cannot be followed")
        return Tracked(text, self.origin)

    def ljust(self, width: SupportsIndex, fill: str = " ", /) -> str:
        return self._padded(0, int(width) - len(self), fill)

    def rjust(self, width: SupportsIndex, fill: str = " ", /) -> str:
        return self._padded(int(width) - len(self), 0, fill)

    def center(self, width: SupportsIndex, fill: str = " ", /) -> str:
        spare = max(int(width) - len(self), 0)
        left = spare // 2 + (spare & int(width) & 1)  # as CPython shares out an odd blank
        return self._padded(left, spare - left, fill)

    def zfill(self, width: SupportsIndex, /) -> str:
        sign = 1 if self[:1] in ("+", "-") else 0
        return joined(self[:sign], self[sign:]._padded(int(width) - len(self), 0, "0"))

    def _padded(self, left: int, right: int, fill: str) -> str:
        check_size(len(self) + max(left, 0) + max(right, 0))
        return joined(fill * left, self, fill * right)


# What a template may call on a text: what keeps the origin, and what only asks.
METHODS = frozenset({
    "strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "split", "rsplit", "splitlines", "partition",
    "rpartition", "join", "replace", "upper", "lower", "title", "capitalize", "ljust", "rjust", "center",
    "zfill",
    "startswith", "endswith", "find", "rfind", "index", "rindex", "count", "isalnum", "isalpha", "isascii",
    "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper",
})  # fmt: skip


def check_size(characters: int) -> None:
    """Raises LimitError for a text that a template may not make."""
    if characters > MAX_CHARACTERS:
        raise LimitError(f"a text of more than {MAX_CHARACTERS} characters")


def check_items(items: int) -> None:
    """Raises LimitError for a list that a template may not make."""
    if items > MAX_ITEMS:
        raise LimitError(f"a list of more than {MAX_ITEMS} items")


def origin_of(text: str) -> str:
    """As long as `text`; what is not tracked is the template's own."""
    return text.origin if type(text) is Tracked else TEMPLATES_OWN * len(text)


def tracked(text: str) -> Tracked:
    """The text with its origin; the template's own, where none is known."""
    return text if type(text) is Tracked else Tracked(text, TEMPLATES_OWN * len(text))


def _added(left: str, right: str) -> Tracked:
    """`joined` of two of which one is tracked: what templates do most often."""
    check_size(len(left) + len(right))
    return Tracked(str.__add__(left, right), origin_of(left) + origin_of(right))


def joined(*parts: str, between: str = "") -> str:
    """`parts` with `between` between them, each character with its origin. Raises LimitError."""
    check_items(len(parts))
    check_size(sum(map(len, parts)) + len(between) * max(len(parts) - 1, 0))
    text = str.join(between, parts)
    if type(between) is not Tracked and not any(type(part) is Tracked for part in parts):
        return text
    return Tracked(text, origin_of(between).join([origin_of(part) for part in parts]))
