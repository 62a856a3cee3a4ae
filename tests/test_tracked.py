"""Tracked text does what str does, and every character of the result has the origin it came with."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelora.data.rendering.spelling import percent, to_json, written
from edgelora.data.rendering.tracked import (
    MAX_CHARACTERS,
    MAX_ITEMS,
    METHODS,
    LimitError,
    Tracked,
    UntrackableError,
    joined,
    origin_of,
    tracked,
)

few = st.text("ab \n\t'\"\\ßİ中\U0001f600", max_size=8)
some = st.text("ab ", min_size=1, max_size=2)
numbers = st.integers(-3, 12)

# a method of str → what it is called with
CALLS = {
    "strip": st.one_of(st.tuples(), st.tuples(some), st.just((None,))),
    "lstrip": st.one_of(st.tuples(), st.tuples(some)),
    "rstrip": st.one_of(st.tuples(), st.tuples(some)),
    "removeprefix": st.tuples(few),
    "removesuffix": st.tuples(few),
    "split": st.one_of(st.tuples(), st.tuples(some), st.tuples(some, numbers), st.tuples(st.none(), numbers)),
    "rsplit": st.one_of(st.tuples(), st.tuples(some), st.tuples(some, numbers), st.tuples(st.none(), numbers)),
    "splitlines": st.one_of(st.tuples(), st.tuples(st.booleans())),
    "partition": st.tuples(some),
    "rpartition": st.tuples(some),
    "join": st.tuples(st.lists(few, max_size=3)),
    "replace": st.one_of(st.tuples(some, few), st.tuples(some, few, numbers)),
    "upper": st.tuples(), "lower": st.tuples(), "title": st.tuples(), "capitalize": st.tuples(),
    "ljust": st.tuples(numbers), "rjust": st.tuples(numbers), "center": st.tuples(numbers), "zfill": st.tuples(numbers),
    "__getitem__": st.tuples(st.slices(8)),
    "__add__": st.tuples(few),
    "__radd__": st.tuples(few),
    "__mul__": st.tuples(st.integers(-1, 3)),
}  # fmt: skip
CHANGES_LETTERS = {"upper", "lower", "title", "capitalize"}
ASKS = {m for m in METHODS if m.startswith("is")} | {
    "startswith", "endswith", "find", "rfind", "index", "rindex", "count",
}  # fmt: skip


def numbered(text: str) -> Tracked:
    """Each character with an origin of its own: 100, 101, …"""
    return Tracked(text, "".join(chr(100 + i) for i in range(len(text))))


def pieces(value: object) -> list[str]:
    return [value] if isinstance(value, str) else list(value)  # type: ignore[call-overload]


def test_every_method_is_tested():
    assert set(CALLS) >= METHODS - ASKS
    for name in ASKS:  # they return no text, so that str's own will do
        assert name not in vars(Tracked)
    for name in METHODS - ASKS:
        assert name in vars(Tracked)


@pytest.mark.parametrize("method", CALLS)
@given(data=st.data())
def test_a_method_does_what_strs_own_does(method, data):
    text, arguments = data.draw(few), data.draw(CALLS[method])
    expected = arguments[0] + text if method == "__radd__" else getattr(text, method)(*arguments)
    try:
        found = getattr(numbered(text), method)(*arguments)
    except UntrackableError:
        assert method in CHANGES_LETTERS
        assert len(expected) != len(text)
        return
    assert found == expected
    assert type(found) is type(expected) or isinstance(found, str)
    for piece in pieces(found):
        origin = origin_of(piece)
        assert len(origin) == len(piece)
        for character, source in zip(str.__str__(piece), origin, strict=True):
            if source != "\0" and method not in CHANGES_LETTERS:
                assert character == text[ord(source) - 100]
    if method not in ("replace", "join", "__add__", "__radd__", "ljust", "rjust", "center", "zfill"):
        assert "\0" not in "".join(map(origin_of, pieces(found)))  # nothing of it was lost


@given(few)
def test_str_iteration_and_adding_from_both_sides(text):
    whole = numbered(text)
    assert str(whole) is whole
    assert [origin_of(c) for c in whole] == list(whole.origin)
    for padded in ("<" + whole + ">", joined("<", whole, ">")):
        assert padded == f"<{str.__str__(whole)}>"
        assert origin_of(padded) == "\0" + whole.origin + "\0"


values = st.recursive(
    st.one_of(few, st.none(), st.booleans(), st.integers(-9, 9), st.floats(-1, 1)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(few, st.integers(0, 9), st.booleans(), st.none()), inner, max_size=3),
    ),
    max_leaves=6,
)


def tracked_all(value):
    """Every text in a value with the origin of its character's code, so that the two can be compared."""
    if isinstance(value, str):
        return Tracked(value, value)
    if isinstance(value, list):
        return [tracked_all(v) for v in value]
    if isinstance(value, dict):
        return {tracked_all(k): tracked_all(v) for k, v in value.items()}
    return value


@given(values, st.booleans(), st.sampled_from([None, 2, "\t"]))
def test_json_is_pythons_own_and_tracked(value, ensure_ascii, indent):
    plain = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
    found = to_json(tracked_all(value), ensure_ascii, indent)
    assert found == plain
    origin = origin_of(found)
    assert len(origin) == len(plain)
    for character, source in zip(plain, origin, strict=True):
        if source.isascii() and source.isalpha() and character.isalpha():  # no escape such as \n
            assert character == source
    said = [c for c in plain if c in "ab"]
    if not any(word in plain for word in ("false", "true", "NaN", "\\u")):
        assert [o for c, o in zip(plain, origin, strict=True) if c in "ab"] == said


@given(values)
def test_print_is_pythons_own_and_tracked(value):
    found = written(tracked_all(value))
    assert found == str(value)
    assert len(origin_of(found)) == len(found)


@pytest.mark.parametrize(
    ("template", "value"),
    [
        ("%s", "x"), ("[%5s|%-5s|%.2s]", ("abc", "abc", "abc")), ("%d %05d %+d", (1, 2, 3)), ("%.2f%%", 1.5),
        ("%(a)s-%(b)d", {"a": "x", "b": 2}), ("%x %X %e %g", (255, 255, 1.0, 2.5)), ("no format", ()), ("%i", 7),
    ],
)  # fmt: skip
def test_percent_is_pythons_own(template, value):
    assert percent(template, value) == template % value


@pytest.mark.parametrize("template", ["%", "%q", "%*d", "%1000s", "%r", "%.100f", "%s %s", "no format"])
def test_percent_refuses_the_rest(template):
    with pytest.raises((ValueError, TypeError)):
        percent(template, 1)


@pytest.mark.parametrize(
    "grow",
    [
        lambda t: t * MAX_CHARACTERS,
        lambda t: t.center(10**10),
        lambda t: t.zfill(10**10),
        lambda t: t.join(["x" * 1000] * 3000),
        lambda t: (t * 90_000).replace("a", "b" * 90_000),
        lambda t: (t * 200_000).split("a"),
        lambda t: ("a " * 150_000 + t).split(),
        lambda t: (t + "\n" * (MAX_ITEMS + 1)).splitlines(),
        lambda t: written([t * 1000] * 3000),
        lambda t: to_json([t * 1000] * 3000),
        lambda t: to_json([t, *range(60_000)], indent=" " * 40),
        lambda t: to_json([[t]], indent=10**9),
    ],
)
def test_nothing_grows_without_end(grow):
    with pytest.raises(LimitError):
        grow(tracked("ab"))
