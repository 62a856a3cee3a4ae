"""How answers are drawn: nothing of them is lost, nothing in them is obeyed, and what moves stays on the screen."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from runtime.shown import Parts, Tail, drawn, show_answer, show_side_by_side, visible

MARKDOWN = st.lists(
    st.sampled_from(
        ["a", "**b**", "`", "```", "```py\n", "~~~", "| x |", "|---|", "\n", "\n\n", "# ", " ", "<b>", "- ", "é"]
    )
).map("".join)


def parts_of(*pieces):
    parts = Parts()
    return [part for piece in pieces for part in parts.feed(piece)] + [parts.rest]


def rendered(part, width=500):
    console = Console(file=io.StringIO(), width=width, no_color=True)
    console.print(drawn(part))
    return [line.rstrip() for line in console.file.getvalue().split("\n")]


@given(MARKDOWN, st.data())
def test_parts_are_the_text_wherever_it_was_cut(text, data):
    at = data.draw(st.integers(0, len(text)))
    parts = parts_of(text)
    assert "\n".join(part.text for part in parts) == text
    assert parts_of(text[:at], text[at:]) == parts
    assert parts_of(*text) == parts


@pytest.mark.parametrize(
    "text",
    [
        "two  blanks", "    indented", "1. one\n7. seven", "- a\n  - b", "5 * 3 * 2", "snake_case", "<think>no</think>",
        "a ** b ** c", "`not closed", "**not closed", "#no heading", "| a pipe", "| a | b |\n| no | rule |",
        "| a <br> b |\n|---|", "roses\nare red", '{"lock": "*"}', "> quoted", "\\* escaped", "[a](b)", "---", "&amp;",
    ],
)  # fmt: skip
def test_what_is_no_clear_markup_stands_as_it_was_said(text):
    shown = [line for part in parts_of(text) for line in rendered(part)[:-1]]
    assert shown == text.split("\n")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("## Title", ["Title"]),
        ("so **bold** and `code`", ["so bold and code"]),
        ("```python\nx = 1\n\ny\n```", ["```python", "x = 1", "", "y", "```"]),
        ("```nonsense\n  x\n```", ["```nonsense", "  x", "```"]),
        ("~~~\n```\n~~~", ["~~~", "```", "~~~"]),
        ("```\nnot closed", ["```", "not closed"]),
    ],
)
def test_marks_become_style(text, shown):
    assert [line for part in parts_of(text) for line in rendered(part)[:-1] if part.text] == shown


def test_what_a_terminal_would_obey_is_shown():
    assert visible("a\x1b[31mb\x07\r\x9b2J\x00") == r"a\x1b[31mb\x07\r\x9b2J\x00"
    kept = "tab\tline\n 漢字 e\u0301 👨\u200d👩 נ"  # joiners and combining signs make characters
    assert visible(kept) == kept


@pytest.mark.parametrize("width", [20, 80])
def test_what_moves_fits_on_the_screen(width):
    console = Console(file=io.StringIO(), width=width, height=10, force_terminal=True, color_system=None)
    console.print(Tail("\n".join(map(str, range(50)))))
    assert console.file.getvalue().split() == [str(n) for n in range(42, 50)]


def test_elsewhere_than_on_a_terminal_an_answer_is_byte_for_byte():
    console = Console(file=io.StringIO(), width=20)
    pieces = ["**a** ", "\x1b[1m very long line that no terminal would show whole\n", "# b"]
    show_answer(console, pieces)
    assert console.file.getvalue() == "".join(pieces) + "\n"
    console = Console(file=io.StringIO(), width=200)
    show_side_by_side(console, [("one", iter(pieces)), ("two", iter(["x"]))])
    assert console.file.getvalue() == f"── one ──\n{''.join(pieces)}\n── two ──\nx\n"


def test_an_answer_broken_off_stays():
    def broken():
        yield "first\nsec"
        raise KeyboardInterrupt

    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with pytest.raises(KeyboardInterrupt):
        show_answer(console, broken())
    lines = console.file.getvalue().split("\n")
    assert any(line.endswith("first") for line in lines)
    assert any(line.endswith("sec") for line in lines)
