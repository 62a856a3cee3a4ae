"""Values written out as text (print, JSON, %-formats, str.format), the strings in them still tracked."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from json.encoder import encode_basestring, encode_basestring_ascii
from string import Formatter
from typing import Any

from edgelora.data.rendering.tracked import (
    TEMPLATES_OWN,
    LimitError,
    Tracked,
    UntrackableError,
    check_size,
    joined,
    origin_of,
    tracked,
)

MAX_INDENT = 40

_CONVERSION = re.compile(r"%(?:\((\w+)\))?([-+ #0]*)(\d{0,3})(\.\d{1,2})?([sdifeEgGxX%])")
_SPEC = re.compile(r"[-+ ,0<>^]*\d{0,3}(\.\d{1,2})?[a-zA-Z%]?")
_QUOTE_OF_JSON, _QUOTE_OF_REPR = re.compile('"'), re.compile("[\"']")


def written(value: Any) -> str:
    """What a template prints for `value`: str(value), its strings still tracked. Raises TypeError for other objects."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple, dict)):
        strings = _strings_of(value, key=_in_repr)
        return _spelled(repr(value), strings, repr, _QUOTE_OF_REPR)
    if value is None or isinstance(value, (bool, int, float)):
        return str(value)
    raise TypeError(f"a chat template prints texts, numbers, lists and dicts, but no {type(value).__name__}")


def to_json(
    value: Any, ensure_ascii: bool = False, indent: int | str | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:  # fmt: skip
    """json.dumps as HF's templates expect it (no HTML escapes); an escaped character keeps its origin."""
    strings = _strings_of(value, key=_in_json, sort=sort_keys)
    if indent is not None and (indent if isinstance(indent, int) else len(indent)) > MAX_INDENT:
        raise LimitError(f"JSON indented by more than {MAX_INDENT}")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    text = encoder.encode(value) if indent is None else _bounded(encoder.iterencode(value))
    return _spelled(text, strings, encode_basestring_ascii if ensure_ascii else encode_basestring, _QUOTE_OF_JSON)


def _bounded(parts: Iterable[str]) -> str:
    """The parts joined; LimitError before they are too many (an indented list of numbers is mostly blanks)."""
    out: list[str] = []
    size = 0
    for part in parts:
        out.append(part)
        size += len(part)
        check_size(size)
    return "".join(out)


def _in_repr(key: Any) -> Iterator[str]:
    return _strings(key, _in_repr, sort=False)


def _in_json(key: Any) -> Iterator[str]:
    yield key if isinstance(key, str) else json.dumps(key)  # {1: …} is written {"1": …}


def _strings_of(value: Any, key: Callable[[Any], Iterator[str]], sort: bool = False) -> list[str]:
    """The strings in a value, in the order in which they are written. Raises LimitError before too many are."""
    strings, size = [], 0
    for string in _strings(value, key, sort):
        strings.append(string)
        size += len(string) + 1
        check_size(size)
    return strings


def _strings(value: Any, of_key: Callable[[Any], Iterator[str]], sort: bool) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item, of_key, sort)
    elif isinstance(value, dict):
        for key in sorted(value) if sort else value:
            yield from of_key(key)
            yield from _strings(value[key], of_key, sort)
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise TypeError(f"{type(value).__name__} is no text, number, list or dict")


def _spelled(text: str, strings: list[str], encode: Callable[[str], str], quote: re.Pattern[str]) -> str:
    """`text`, which spells out `strings` in this order and nothing else between quotes, with their origins."""
    check_size(len(text))
    if not any(type(string) is Tracked for string in strings):
        return text
    origins: list[str] = []
    at = 0
    for string in strings:
        found = quote.search(text, at)
        assert found is not None, "every string is written between quotes"
        code = encode(string)
        origins += TEMPLATES_OWN * (found.end() - at), _spread(string, code, encode), TEMPLATES_OWN
        at = found.start() + len(code)
    origins.append(TEMPLATES_OWN * (len(text) - at))
    return Tracked(text, "".join(origins))


def _spread(string: str, code: str, encode: Callable[[str], str]) -> str:
    """The origin of `code` between its quotes: an escape is as long as the encoder makes it."""
    origin, room = origin_of(string), len(code) - 2
    if room == len(string):
        return origin
    plain = str.__str__(string)
    lengths = {c: len(encode(c)) - 2 for c in set(plain)}
    if sum(lengths[c] for c in plain) != room:
        lengths["'"] = 2  # repr escapes it where both quotes are in the text
    return "".join([o * lengths[c] for c, o in zip(plain, origin, strict=True)])


def percent(template: str, values: Any) -> str:
    """`template % values` for %s, %d, %f … with widths below 1000. Raises ValueError or TypeError for the rest."""
    left = list(values) if isinstance(values, tuple) else [values]
    parts: list[str] = []
    at = 0
    for match in _CONVERSION.finditer(template):
        parts.append(template[at : match.start()])
        at = match.end()
        name, flags, width, precision, kind = match.groups()
        if kind == "%":
            parts.append("%")
            continue
        if name is None and not left:
            raise TypeError("not enough arguments for a format")
        value = left.pop(0) if name is None else values[name]
        if kind == "s":
            text = tracked(written(value))[: int(precision[1:]) if precision else None]
            parts.append(text.ljust(int(width or 0)) if "-" in flags else text.rjust(int(width or 0)))
        else:
            parts.append(f"%{flags}{width}{precision or ''}{kind}" % value)
    parts.append(template[at:])
    if any("%" in part for part in parts[::2]):
        raise ValueError("a format such as no chat template needs")
    if left and not isinstance(values, Mapping):
        raise TypeError("not all arguments of a format are used")
    return joined(*parts)


def braces(template: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """`template.format(…)` for fields such as {}, {0}, {name} and {n:.2f}. Raises ValueError for any other."""
    if origin_of(template).strip(TEMPLATES_OWN):
        raise UntrackableError("what a message says is used as a format")
    parts: list[str] = []
    next_one = itertools.count()
    for literal, name, spec, conversion in Formatter().parse(template):
        parts.append(literal)
        if name is None:
            continue
        value = kwargs[name] if name.isidentifier() else args[int(name) if name else next(next_one)]
        if conversion or (spec and (isinstance(value, str) or not _SPEC.fullmatch(spec))):
            raise ValueError("a format such as no chat template needs")
        parts.append(format(value, spec) if spec else written(value))
    return joined(*parts)
