"""Reading conversations whole: every fault of a file at once, with its line. Formats and files: test_formats.py,
test_sources.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgelora.data.conversation import Conversation, Message, read_conversations
from edgelora.errors import DataError

ROW = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello ✓"}]}'
PARSED = Conversation((Message("user", "Hi"), Message("assistant", "Hello ✓")))


def write(folder: Path, *lines: str | bytes, end: bytes = b"\n") -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + end for line in lines))
    return path


def faults(path: Path) -> list[str]:
    """The lines between the title and the reason."""
    with pytest.raises(DataError) as caught:
        read_conversations(path)
    assert caught.value.why
    assert caught.value.fix
    return caught.value.what.split("\n  ")[1:]


def test_a_conversation_of_another_format(tmp_path):
    path = write(tmp_path, ROW, '{"instruction": "Hi", "input": "", "output": "Hello ✓"}')
    assert read_conversations(path) == [PARSED, PARSED]


def test_rows_that_are_no_conversations_are_named(tmp_path):
    path = write(tmp_path, ROW, '{"text": "Hi"}', '{"input_ids": [1, 2]}')
    assert faults(path) == [
        f"{path}:2: a row of the format text, not a conversation",
        f"{path}:3: a row of the format tokenized, not a conversation",
    ]


def test_prompt_and_answer():
    assert (PARSED.prompt, PARSED.answer, PARSED.group) == ((Message("user", "Hi"),), "Hello ✓", None)


def test_group_and_other_keys(tmp_path):
    path = write(tmp_path, ROW[:-1] + ', "group": "lights", "id": 7}')
    assert read_conversations(path) == [Conversation(PARSED.messages, "lights")]


def test_contents_are_kept_to_the_letter(tmp_path):
    text = '  two\r\n lines\t\u2028 and \u0000 \U0001f600 \\ " {{ x }} <|im_end|> '
    row = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
    for ascii_only in (False, True):
        path = write(tmp_path, json.dumps(row, ensure_ascii=ascii_only))
        assert [m.content for m in read_conversations(path)[0].messages] == [text, text]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n", b"\r\n \t\r\n"], ids=repr)
def test_line_ends_and_blank_lines(tmp_path, end):
    assert read_conversations(write(tmp_path, ROW, ROW, end=end)) == [PARSED, PARSED]


def test_the_last_line_needs_no_end(tmp_path):
    assert read_conversations(write(tmp_path, ROW, end=b"")) == [PARSED]


def chat(*messages: object, **more: object) -> str:
    return json.dumps({"messages": messages, **more})


CALL = {"function": {"name": "light", "arguments": {"on": True}}}
USER, SAYS = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def test_tool_calls_are_read_as_templates_want_them(tmp_path):
    """OpenAI writes arguments as JSON in a text and leaves content out; templates expect an object."""
    call = {"id": "1", "type": "function", "function": {"name": "light", "arguments": '{"on": true}'}}
    result = {"role": "tool", "content": "done", "tool_call_id": "1"}
    row = chat(USER, {"role": "assistant", "content": None, "tool_calls": [call]}, result, SAYS, tools=[CALL])
    (found,) = read_conversations(write(tmp_path, row))
    asked, answered = found.messages[1:3]
    assert asked.content is None
    assert asked.tool_calls[0]["function"] == {"name": "light", "arguments": {"on": True}}
    assert (answered.role, answered.tool_call_id) == ("tool", "1")
    assert found.tools[0]["function"]["name"] == "light"


BROKEN = {
    "not JSON": ("{", "Expecting property name"),
    "cut short": (ROW[:-1], "Expecting"),
    "two rows in a line": (ROW + ROW, "Extra data"),
    "a list": ("[1]", "a row must be a JSON object"),
    "a number": ("1", "a row must be a JSON object"),
    "null": ("null", "a row must be a JSON object"),
    "nested deeply": ("[" * 100_000, "nested too deeply"),
    "nested deeply in a row": ('{"messages": ' + "[" * 100_000, "nested too deeply"),
    "a number of 5000 digits": ('{"messages": ' + "1" * 5000 + "}", "digits"),
    "no known key": ('{"question": "Hi", "x": 1}', "no format has the keys of this row: question, x"),
    "no key": ("{}", "no format has the keys of this row: none"),
    "a weight of a user": (chat({**USER, "weight": 1}, SAYS), "`weight` in a message by `user`"),
    "a negative weight": (chat(USER, {**SAYS, "weight": -1}), "`weight` is not a number from 0 up"),
    "an infinite weight": ('{"messages": [{"role": "assistant", "content": "a", "weight": Infinity}]}', "`weight`"),
    "a weight that is a truth value": (chat(USER, {**SAYS, "weight": True}), "`weight`"),
    "tool calls of a user": (chat({**USER, "tool_calls": [CALL]}, SAYS), "`tool_calls`"),
    "tool calls that are no list": (chat(USER, {"role": "assistant", "tool_calls": CALL}), "`tool_calls`"),
    "a tool call without a name": (chat(USER, {"role": "assistant", "tool_calls": [{"function": {}}]}), "name"),
    "arguments that are a list": (
        chat(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}),
        "`arguments`",
    ),
    "arguments that are no JSON": (
        chat(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}),
        "`arguments`",
    ),
    "tools that are a text": (chat(USER, SAYS, tools="search"), "`tools`"),
    "no messages": (chat(), "`messages` is not a list with at least one message"),
    "messages is a text": ('{"messages": "Hi"}', "`messages` is not a list"),
    "messages is null": ('{"messages": null}', "`messages` is not a list"),
    "a message is a text": (chat("Hi", SAYS), "every message needs a `role`"),
    "no role": (chat({"content": "Hi"}, SAYS), "every message needs a `role` (system, user, assistant, tool)"),
    "an unknown role": (chat({"role": "narrator", "content": "Hi"}, SAYS), "every message needs a `role`"),
    "role is a list": (chat({"role": ["user"], "content": "Hi"}, SAYS), "every message needs a `role`"),
    "content is null": (chat(USER, {"role": "assistant", "content": None}), "a text `content`"),
    "content is a list": (chat(USER, {"role": "assistant", "content": ["Hi"]}), "a text `content`"),
    "no assistant turn": (chat(USER), "no assistant turn to learn"),
    "the user speaks last": (chat(USER, SAYS, USER), "no assistant turn to learn"),
    "an empty answer": (chat(USER, {"role": "assistant", "content": " \n"}), "no assistant turn to learn"),
    "group is a number": (chat(USER, SAYS, group=1), "`group` is not a text"),
    "half a surrogate pair": (chat(USER, {"role": "assistant", "content": "\ud83d"}), ""),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_line_is_named_with_its_reason(tmp_path, case):
    line, why = BROKEN[case]
    path = write(tmp_path, ROW, "", line, ROW)
    (fault,) = faults(path)
    assert fault.startswith(f"{path}:3: ")
    assert why in fault


def test_all_broken_lines_at_once(tmp_path):
    path = write(tmp_path, *["{}", "[]"] * 12)
    found = faults(path)
    assert [f.split(": ")[0] for f in found[:20]] == [f"{path}:{n}" for n in range(1, 21)]
    assert found[20:] == ["… and 4 more"]


@pytest.mark.parametrize(("n", "title"), [(1, "1 broken line"), (2, "2 broken lines"), (20, "20 broken lines")])
def test_the_title_counts_them(tmp_path, n, title):
    path = write(tmp_path, *["{}"] * n)
    with pytest.raises(DataError) as caught:
        read_conversations(path)
    assert caught.value.what.split("\n")[0] == f"{path}: {title}"
    assert len(caught.value.what.split("\n")) == 1 + n


@pytest.mark.parametrize("raw", [b"", b"\n\n", b" \r\n"], ids=repr)
def test_an_empty_file(tmp_path, raw):
    path = write(tmp_path, raw, end=b"")
    with pytest.raises(DataError) as caught:
        read_conversations(path)
    assert (caught.value.what, caught.value.why) == (f"{path}: no rows in it", "the file is empty")


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(DataError) as caught:
            read_conversations(path)
        assert caught.value.what.startswith(f"{path}: cannot be read (")


@pytest.mark.parametrize("raw", ["ä".encode("latin-1"), ROW.encode("utf-16"), b"GGUF\x03\xff"], ids=repr)
def test_not_utf8(tmp_path, raw):
    path = write(tmp_path, raw)
    with pytest.raises(DataError) as caught:
        read_conversations(path)
    assert caught.value.what == f"{path}: not a text file in UTF-8"
    assert caught.value.fix == "convert the file to UTF-8"


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    assert read_conversations(write(tmp_path, b"\xef\xbb\xbf" + ROW.encode())) == [PARSED]
