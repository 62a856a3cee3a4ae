"""Text from the bytes of tokens: whole characters, no part of a stop string, wherever the tokens end."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.lookup import SIZES, Lookup
from runtime.text import TextStream, WholeCharacters

# few letters, some of several bytes: stop strings then occur, overlap and end inside characters
LETTERS = st.text(alphabet="abä€😀", max_size=12)
STOPS = st.lists(st.text(alphabet="abä€😀", min_size=1, max_size=4), max_size=3)


def oracle(raw: bytes, stops: list[str]) -> tuple[str, str | None]:
    """All at once: the text up to the stop string that is complete first (the longer, where two end together)."""
    text = raw.decode("utf-8", "replace")
    ends = [(text.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    return (text[: min(ends)[0] + min(ends)[1]], min(ends)[2]) if ends else (text, None)


def pieces(raw: bytes, cuts: list[int], stops: list[str]) -> tuple[list[str], TextStream]:
    stream = TextStream(stops)
    places = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
    got = [stream.push(raw[a:b]) for a, b in pairwise(places)]
    return [*got, stream.finish()], stream


@settings(deadline=None, max_examples=300)
@given(raw=LETTERS.map(str.encode) | st.binary(max_size=12), cuts=st.lists(st.integers(0, 60)), stops=STOPS)
def test_a_stream_gives_what_all_at_once_gives(raw, cuts, stops):
    got, stream = pieces(raw, cuts, stops)
    assert ("".join(got), stream.stopped) == oracle(raw, stops)


@settings(deadline=None, max_examples=300)
@given(text=LETTERS, stops=STOPS)
def test_what_can_be_shown_is_shown_at_once(text, stops):
    """Held back is only what a stop string may begin with, or a part of a character."""
    raw, stream, shown = text.encode(), TextStream(stops), ""
    for i in range(len(raw)):
        shown += stream.push(raw[i : i + 1])
        if stream.stopped is None:
            held = raw[: i + 1].decode("utf-8", "ignore").removeprefix(shown)
            assert held == "" or any(stop.startswith(held) for stop in stops)


def test_bytes_that_begin_no_character_are_seen_at_once():
    """Of any two bytes: allowed where some character begins with them."""
    begins = {chr(c).encode()[:n] for c in (*range(0xD800), *range(0xE000, 0x110000, 16)) for n in (1, 2)}
    for first, second in product(range(256), repeat=2):
        raw, characters = bytes([first, second]), WholeCharacters()
        assert characters.allows(raw[:1], last=False) == (raw[:1] in begins)
        if raw[:1] in begins:
            characters.accept(raw[:1])
            assert characters.allows(raw[1:], last=False) == (raw[1:] in begins if first < 128 else raw in begins)
            ends = second < 128 if first < 128 else raw in begins and bool(raw.decode("utf-8", "ignore"))
            assert characters.allows(raw[1:], last=True) == ends


def test_no_stop_string_shows_even_in_part():
    stream = TextStream(["<|end|>", "\n\n"])
    assert [stream.push(p) for p in (b"Yes", b".<|e", b"nd", b"less", b"\n", b"x<|en", b"d|> and more")] == [
        "Yes", ".", "", "<|endless", "", "\nx", "",
    ]  # fmt: skip
    assert (stream.stopped, stream.push(b"more"), stream.finish()) == ("<|end|>", "", "")


def test_what_was_held_comes_at_the_end():
    stream = TextStream(["STOP"])
    assert [stream.push(b"STO"), stream.push("ä".encode()[:1]), stream.finish()] == ["", "", "STO\ufffd"]


@settings(deadline=None, max_examples=300)
@given(tokens=st.lists(st.integers(0, 3), max_size=40), n=st.integers(0, 6))
def test_a_draft_is_what_followed_the_last_tokens_before(tokens, n):
    def naive() -> list[int]:
        for size in SIZES:
            for place in range(len(tokens) - size - 1, -1, -1):  # the latest place but the end itself
                if len(tokens) >= size and tokens[place : place + size] == tokens[-size:]:
                    return tokens[place + size :][:n]
        return []

    assert Lookup(tokens).draft(n) == naive()
    grown = Lookup()
    for token in tokens:
        grown.extend([token])
    assert grown.draft(n) == naive()


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3]])
def test_nothing_is_guessed_without_a_precedent(tokens):
    assert Lookup(tokens).draft(4) == []
