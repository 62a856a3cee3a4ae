"""GBNF, llama.cpp's notation for grammars, read as its own parser (src/llama-grammar.cpp) reads it, within limits.

That parser recurses at each parenthesis, copies what is repeated and counts down from a `{5,2}` for ever, so what is
too deep or too large is refused here. Rules come out expanded as there: what follows can be counted on them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from edgelora.errors import ConfigError

MAX_BYTES = 1 << 17
MAX_DEPTH = 64  # parentheses within each other: a C stack of 512 KiB (a thread's on macOS) holds it easily
MAX_REPEAT = 2000  # llama.cpp's: beyond it `{m,n}` silently means "without end" there
MAX_ELEMENTS = 100_000  # of all rules once repetitions are written out
ANY = ((0, 0x10FFFF),)

_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_NAME = re.compile(r"[A-Za-z0-9-]+")
_CHARACTER = re.compile(r'\\x([0-9A-Fa-f]{2})|\\u([0-9A-Fa-f]{4})|\\U([0-9A-Fa-f]{8})|\\([trn\\"\[\]-])|([^\\])', re.S)
_TOKEN = re.compile(r"!?<(?:\[([0-9]{1,9})\]|[^>\[][^>]*)>")
_BRACES = re.compile(r"\{ *([0-9]{1,9}) *(,)? *([0-9]{1,9})? *\}")


@dataclass(frozen=True)
class Characters:
    """One character of the text: in one of the ranges (both ends included), or in none of them."""

    ranges: tuple[tuple[int, int], ...]
    negated: bool = False

    def match(self, character: int) -> bool:
        return any(low <= character <= high for low, high in self.ranges) != self.negated


@dataclass(frozen=True)
class Token:
    """One token of the vocabulary, or any other one."""

    text: str


Element = Characters | Token | int  # an int refers to a rule
Sequence = list[Element]
Rule = list[Sequence]  # alternatives


@dataclass
class Rules:
    """A grammar: rules by number. Those without a name in the text were made of groups and repetitions."""

    names: dict[str, int] = field(default_factory=dict)
    rules: dict[int, Rule] = field(default_factory=dict)
    n_symbols: int = 0

    def symbol(self, name: str | None = None) -> int:
        """The number of the rule of this name; of a new one where there is none."""
        if name is None or name not in self.names:
            if name is not None:
                self.names[name] = self.n_symbols
            self.n_symbols += 1
            return self.n_symbols - 1
        return self.names[name]

    def name(self, rule: int) -> str:
        """As the text has it; of a part of a rule, the rule's name is not kept."""
        return next((name for name, number in self.names.items() if number == rule), "a part in parentheses")


def refused(what: str, why: str, fix: str = "write a smaller grammar") -> ConfigError:
    """The error for a grammar, `what` and `why` in its user's terms."""
    return ConfigError(what=f"the grammar: {what}", why=why, fix=fix)


def parse_gbnf(text: str) -> Rules:
    """Raises ConfigError where llama.cpp could not read `text`, or where reading it would not end well."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError as e:
        raise refused("half a surrogate pair", "it has no UTF-8 form", "write whole characters") from e
    if size > MAX_BYTES:
        raise refused(f"{size:,} bytes", f"at most {MAX_BYTES:,} are read")
    if "\0" in text:
        raise refused("a character of code 0", "C ends a text there", r"write \x00")
    return _Parser(text).parse()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self._rules = Rules()
        self._n_elements = 0

    def parse(self) -> Rules:
        self._skip(_LINES)
        while self._at < len(self._text):
            self._rule()
        return self._rules

    def _fault(self, expected: str) -> ConfigError:
        line = self._text.count("\n", 0, self._at) + 1
        found = self._text[self._at : self._at + 20].split("\n")[0]
        return refused(f"line {line}: {expected}", f"found {found!r}", "see llama.cpp's grammars/README.md")

    def _skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self._text, self._at)
        assert match is not None
        self._at = match.end()

    def _take(self, pattern: re.Pattern[str], expected: str) -> re.Match[str]:
        match = pattern.match(self._text, self._at)
        if match is None:
            raise self._fault(expected)
        self._at = match.end()
        return match

    def _peek(self, text: str) -> bool:
        return self._text.startswith(text, self._at)

    def _rule(self) -> None:
        name = self._take(_NAME, "expected the name of a rule").group()
        self._skip(_SPACE)
        if not self._peek("::="):
            raise self._fault("expected ::=")
        self._at += 3
        number = self._rules.symbol(name)
        if number in self._rules.rules:
            raise refused(f"{name} is defined twice", "the second would silently count", "give each rule one name")
        self._skip(_LINES)
        self._alternatives(number, 0)
        if self._at < len(self._text) and self._text[self._at] not in "\r\n":
            raise self._fault("expected the end of a rule")
        self._skip(_LINES)

    def _alternatives(self, rule: int, depth: int) -> None:
        found = [self._sequence(depth)]
        while self._peek("|"):
            self._at += 1
            self._skip(_LINES)
            found.append(self._sequence(depth))
        self._rules.rules[rule] = found

    def _sequence(self, depth: int) -> Sequence:
        sequence: Sequence = []
        last, weight = 0, 1  # where the last symbol began, and how many rules llama.cpp counts for it
        while self._at < len(self._text):
            c = self._text[self._at]
            if c in "*+?{":
                weight = self._repeat(sequence, last, weight)
            elif c == "(":
                last, before = len(sequence), self._rules.n_symbols
                sequence.append(self._group(depth))
                weight = max(1, self._rules.n_symbols - before)
            elif (symbol := self._symbol(c)) is not None:
                last, weight = len(sequence), 1
                sequence += symbol
            else:
                break
            self._count(len(sequence) - last)
            self._skip(_LINES if depth else _SPACE)
        return sequence

    def _count(self, elements: int) -> None:
        self._n_elements += elements
        if self._n_elements > MAX_ELEMENTS:
            raise refused(f"more than {MAX_ELEMENTS:,} elements", "each repetition is written out")

    def _symbol(self, c: str) -> Sequence | None:
        """A literal, a class, a token or a rule's name: its elements; None if none of them begins here."""
        if c == '"':
            return self._literal()
        if c == "[":
            return [self._class()]
        if c in "<!":
            return [Token(self._take(_TOKEN, "expected <token> or <[id]>").group())]
        if c == ".":
            self._at += 1
            return [Characters(ANY)]
        if match := _NAME.match(self._text, self._at):
            self._at = match.end()
            return [self._rules.symbol(match.group())]
        return None

    def _character(self) -> int:
        match = self._take(_CHARACTER, "expected a character")
        code = next((int(digits, 16) for digits in match.group(1, 2, 3) if digits), None)
        if code is None:
            short = {"t": "\t", "r": "\r", "n": "\n"}
            code = ord(short.get(match[4], match[4]) if match[4] else match[5])
        if code > ANY[0][1]:
            raise self._fault("no character has this code")
        return code

    def _literal(self) -> Sequence:
        self._at += 1
        codes = []
        while not self._peek('"'):
            codes.append(self._character())
        self._at += 1
        return [Characters(((code, code),)) for code in codes]

    def _class(self) -> Characters:
        negated = self._text.startswith("[^", self._at)
        self._at += 2 if negated else 1
        ranges = []
        while not self._peek("]"):
            low = high = self._character()
            if self._peek("-") and not self._peek("-]"):
                self._at += 1
                high = self._character()
            ranges.append((low, high))
        if not ranges:
            raise self._fault("a class of no characters")
        self._at += 1
        return Characters(tuple(ranges), negated)

    def _group(self, depth: int) -> int:
        if depth >= MAX_DEPTH:
            raise refused(f"parentheses {depth + 1} deep", f"at most {MAX_DEPTH} are read", "give parts a rule's name")
        self._at += 1
        self._skip(_LINES)
        rule = self._rules.symbol()
        self._alternatives(rule, depth + 1)
        if not self._peek(")"):
            raise self._fault("expected )")
        self._at += 1
        return rule

    def _bounds(self) -> tuple[int, int | None]:
        c = self._text[self._at]
        if c != "{":
            self._at += 1
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[c]
        match = self._take(_BRACES, "expected {m}, {m,} or {m,n}")
        low = int(match[1])
        if match[3] and not match[2]:
            raise self._fault("expected {m}, {m,} or {m,n}")
        high = int(match[3]) if match[3] else None if match[2] else low
        return low, high

    def _repeat(self, sequence: Sequence, last: int, weight: int) -> int:
        """Write out the repetition of the last symbol as llama.cpp does; returns the weight of the whole."""
        if last == len(sequence):
            raise self._fault("nothing stands before this repetition")
        low, high = self._bounds()
        if high is not None and high < low:
            raise refused(f"a repetition {{{low},{high}}}", "its end is below its beginning", "turn the two around")
        weight *= (high or 1) if high is not None else max(low, 1)
        if weight > MAX_REPEAT:
            raise refused(f"{weight:,} repetitions of one part", f"at most {MAX_REPEAT:,} are written out")
        item = sequence[last:]
        self._count(len(item) * max(low, high or 0))
        del sequence[last:]
        sequence += item * low
        if high is None or high > low:
            sequence.append(self._optional(item, None if high is None else high - low))
        return weight

    def _optional(self, item: Sequence, times: int | None) -> int:
        """A rule for up to `times` of `item`, or any number of them."""
        rule = self._rules.symbol()
        if times is None:
            self._rules.rules[rule] = [[*item, rule], []]
            return rule
        self._rules.rules[rule] = [list(item), []]
        for _ in range(times - 1):
            inner, rule = rule, self._rules.symbol()
            self._rules.rules[rule] = [[*item, inner], []]
        return rule
