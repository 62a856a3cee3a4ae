"""`edgelora tokenize`: the ids of training, shown piece by piece, and held against llama.cpp's own tokenizer."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import TEMPLATE
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from edgelora.base.model import Base, open_base
from edgelora.cli import display, run
from edgelora.cli import tokenize as command
from edgelora.data.conversation import read_conversations
from edgelora.data.encode import encode_conversation
from edgelora.data.template import ChatTemplate
from edgelora.errors import CertificateError, DataError
from edgelora.pipeline import tokenize as pipeline
from edgelora.pipeline.tokenize import Tokenized, check, difference_of_chat, read_text, tokenize_text, tokens_of
from edgelora.words import visible
from runtime.binding import Model

TEXT = "Turn on the light in the kitchen,\n\tplease: <|im_end|> größer 日本 🙂"
ROWS = (
    '{"messages": [{"role": "user", "content": "Turn it <|im_end|> on"}, {"role": "assistant", "content": "Done."}]}',
    '{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And\\nnow?"}, '
    '{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "x"}, '
    '{"role": "assistant", "content": "No."}]}',
)

STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(ROWS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def checkpoint(shared_data, tmp_path_factory) -> Path:
    """stories260K as a Hugging Face folder, without the GGUF beside it."""
    folder = tmp_path_factory.mktemp("stories")
    for file in (shared_data / "models" / "stories260K").iterdir():
        if file.suffix != ".gguf":
            shutil.copyfile(file, folder / file.name)
    return folder


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    assert run(["tokenize", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def encoded(base: Base, path: Path) -> list[Tokenized]:
    return list(pipeline.tokenize_chats(base, path)[1])


# -- ids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parse_special", [False, True])
def test_a_text_gets_llama_cpps_ids(tiny, capsys, parse_special):
    found = shown(capsys, tiny.path, "--text", TEXT, *["--parse-special"] * parse_special)
    model = Model(tiny.path, vocabulary_only=True)
    assert found["rows"][0]["ids"] == model.tokenize(TEXT, parse_special=parse_special)
    model.close()
    assert ("<|im_end|>" in found["rows"][0]["pieces"]) is parse_special
    assert any(found["rows"][0]["special"]) is parse_special
    assert found["compared"] is None


def test_pieces_are_the_bytes_of_the_text(tiny):
    base = open_base(tiny.path)
    row = tokenize_text(base, TEXT)
    assert b"".join(token.piece for token in tokens_of(base, row)).decode() == TEXT


def test_json_counts_tokens_and_bytes(tiny, capsys):
    row = shown(capsys, tiny.path, "--text", "größer")["rows"][0]
    assert row["n_bytes"] == 8
    assert row["n_tokens"] == len(row["ids"]) == len(row["pieces"]) == len(row["special"])
    assert "loss_mask" not in row


def test_half_a_character_is_written_as_bytes(tiny, capsys):
    pieces = shown(capsys, tiny.path, "--text", "é")["rows"][0]["pieces"]
    assert pieces == [r"\xc3", r"\xa9"]


def test_chats_are_shown_as_they_are_trained(tiny, rows, capsys):
    base = open_base(tiny.path)
    found = shown(capsys, tiny.path, "--chat", rows)["rows"]
    for row, conversation in zip(found, read_conversations(rows), strict=True):
        example = encode_conversation(conversation, base.tokenizer, base.template)
        assert row["ids"] == example.input_ids.tolist()
        assert row["loss_mask"] == example.loss_mask.tolist()
        assert row["prompt"] == base.template.render(conversation.messages).text
        assert "".join(row["pieces"]) == row["prompt"]
    control = [piece for piece, special in zip(found[0]["pieces"], found[0]["special"], strict=True) if special]
    assert control == ["<|im_start|>", "<|im_end|>"] * 2  # and not the one that the user wrote
    learned = [piece for piece, has_loss in zip(found[0]["pieces"], found[0]["loss_mask"], strict=True) if has_loss]
    assert "".join(learned) == "Done.<|im_end|>"


def test_a_turn_of_weight_0_is_shown_as_not_learned(tiny, tmp_path, capsys):
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    row = {"messages": [*said, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (found,) = shown(capsys, tiny.path, "--chat", tmp_path / "rows.jsonl")["rows"]
    learned = [piece for piece, has_loss in zip(found["pieces"], found["loss_mask"], strict=True) if has_loss]
    assert "".join(learned) == "d<|im_end|>"


def test_a_base_without_a_template_takes_a_chosen_one(make_tiny, rows, capsys):
    mute = make_tiny(template=None).path
    assert run(["tokenize", str(mute), "--chat", str(rows)]) == 1
    assert "it has no chat template" in capsys.readouterr().err
    assert shown(capsys, mute, "--chat", rows, "--chat-template", "chatml")["rows"][0]["prompt"].startswith("<|im_sta")


# -- sources ------------------------------------------------------------------------------------------------------


def test_a_file_is_read_byte_for_byte(tiny, tmp_path, capsys, monkeypatch):
    raw = b"\xef\xbb\xbfa\r\nb\0"
    (tmp_path / "text").write_bytes(raw)
    from_file = shown(capsys, tiny.path, "--file", tmp_path / "text")["rows"][0]
    assert from_file["n_bytes"] == len(raw)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(raw)))
    assert shown(capsys, tiny.path, "--file", "-")["rows"][0] == from_file


def test_a_text_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "LARGEST_TEXT", 1 << 20)
    (tmp_path / "text").write_bytes(b"a" * (1 << 20))
    assert len(read_text(tmp_path / "text")) == 1 << 20
    with (tmp_path / "text").open("ab") as f:
        f.truncate(1 << 40)
    with pytest.raises(DataError, match="more than 1 MB"):
        read_text(tmp_path / "text")


def test_a_file_of_bytes_is_no_text_however_large(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "LARGEST_TEXT", 10)
    (tmp_path / "text").write_bytes(b"GGUF\3\0\0\0\xff\xff\xff\xff\xff")
    with pytest.raises(DataError, match="not a text in UTF-8"):
        read_text(tmp_path / "text")
    (tmp_path / "text").write_text("größer als 10", encoding="utf-8")  # cut behind the limit, not in a character
    with pytest.raises(DataError, match="more than"):
        read_text(tmp_path / "text")
    (tmp_path / "text").write_text("123456789\u65e5\u672c", encoding="utf-8")  # cut in the middle of one
    with pytest.raises(DataError, match="more than"):
        read_text(tmp_path / "text")


def called(*arguments: object, raw: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`edgelora tokenize` as a process, its output in a pipe."""
    command = [sys.executable, "-m", "edgelora", "tokenize", *arguments]
    return subprocess.run(
        command, input=raw, capture_output=True, env={**os.environ, **environment}, timeout=60, check=False
    )


def test_conversations_come_from_standard_input_too(tiny, rows):
    done = called(tiny.path, "--chat", "-", raw=rows.read_bytes())
    assert (done.returncode, done.stdout) == (0, called(tiny.path, "--chat", rows).stdout)
    assert done.stdout.count(b"\n\n") == 1


def test_an_argument_is_utf8_in_any_locale(tiny):
    """In an ASCII locale Python reads each byte of it as half of a surrogate pair."""
    done = called(tiny.path, "--text", "größer", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (done.returncode, done.stderr[:20]) == (0, b"%d tokens for 8 bytes" % done.stdout.count(b"\n"))
    assert done.stdout.isascii()
    assert done.stdout.decode().encode("latin-1", "backslashreplace").count(b"\\x") == 4  # two bytes of each letter


def test_a_row_that_the_template_refuses_is_named(make_tiny, rows, capsys):
    assert run(["tokenize", str(make_tiny(template=STRICT).path), "--chat", str(rows)]) == 1
    shown = capsys.readouterr()
    assert "error: row 2: the chat template refused a conversation: no system" in shown.err


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("", "nothing to tokenize"),
        ("--text a --file {rows}", "--text and --file to tokenize"),
        ("--text a --file {rows} --chat {rows}", "--text and --file and --chat to tokenize"),
        ("--chat {rows} --parse-special", "--parse-special with --chat"),
        ("--text a --chat-template chatml", "--chat-template with --text"),
        ("--chat {rows} --chat-template chatml", "it has a chat template of its own"),
        ("--file {folder}", "cannot be read (Is a directory)"),
        ("--file {folder}/missing", "cannot be read (No such file or directory)"),
        ("--file {latin}", "not a text in UTF-8"),
        ("--text {byte}", "--text: not a text in UTF-8"),
        ("--text {half}", "half of a surrogate pair at character 1"),
        ("--chat {latin}", "not a text file in UTF-8"),
        ("--chat {folder}/missing", "cannot be read"),
    ],
)
def test_what_cannot_be_tokenized_is_three_lines(tiny, rows, tmp_path, capsys, line, what):
    latin = tmp_path / "latin"
    latin.write_bytes("größer".encode("latin-1"))
    words = [w.format(rows=rows, folder=tmp_path, latin=latin, byte="a\udcff", half="a\ud83d") for w in line.split()]
    assert run(["tokenize", str(tiny.path), *words]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    first, why, fix = shown.err.splitlines()
    assert what in first
    assert (why[:7], fix[:7]) == ("  why: ", "  fix: ")


# -- --check ------------------------------------------------------------------------------------------------------


def test_check_compares_every_id(tiny, rows, capsys):
    found = shown(capsys, tiny.path, "--chat", rows, "--check")
    assert found["compared"] == sum(row["n_tokens"] for row in found["rows"])
    assert run(["tokenize", str(tiny.path), "--text", TEXT, "--parse-special", "--check"]) == 0
    assert "llama.cpp gives the same" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--text", TEXT], ["--text", "a <s>b</s>", "--parse-special"]])
def test_check_of_a_checkpoint_asks_llama_cpp_too(checkpoint, capsys, arguments):
    found = shown(capsys, checkpoint, *arguments, "--check")
    assert found["compared"] == found["rows"][0]["n_tokens"] > 0


def test_check_of_a_checkpoints_conversations(checkpoint, rows, capsys):
    found = shown(capsys, checkpoint, "--chat", rows, "--chat-template", "chatml", "--check")
    assert found["compared"] == sum(row["n_tokens"] for row in found["rows"])
    assert found["rows"][0]["pieces"][0] == "<s>"


def test_check_keeps_the_treatment_of_blanks_behind_special_tokens(checkpoint):
    """No key says it: llama.cpp finds it in the name of the model."""
    base = open_base(checkpoint)
    tokens = (*base.vocabulary.tokens[:-1], "<|endoftext|>")  # without which llama.cpp does not load a Phi-3
    base.__dict__["vocabulary"] = replace(base.vocabulary, tokens=tokens, strip_after_special=True)
    with pipeline._vocabulary_in_llama_cpp(base) as model:
        assert model.tokenize("</s>  a", parse_special=True) == base.tokenizer.encode("</s>  a", parse_special=True).ids
        assert len(model.tokenize("</s>  a", parse_special=True)) == len(model.tokenize("</s>a", parse_special=True))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda ids: [ids[0], ids[1] + 1, *ids[2:]], "id 1 is "),
        (lambda ids: ids[:-1], "is the end, in llama.cpp "),
        (lambda ids: [*ids, 80], "in llama.cpp the end"),
    ],
    ids=["other", "too few", "too many"],
)
def test_the_first_difference_of_a_text_is_named(tiny, change, what):
    base = open_base(tiny.path)
    row = tokenize_text(base, "Turn on the light")
    with pytest.raises(CertificateError) as caught:
        check(base, [replace(row, ids=change(row.ids))])
    assert what in caught.value.what
    assert f"{row.ids[1]} {base.tokenizer.piece(row.ids[1])!r}" in caught.value.what or "end" in what


def test_the_first_difference_of_chats_names_the_row(tiny, rows):
    base = open_base(tiny.path)
    one, two = encoded(base, rows)
    at = two.learned.index(True)
    with pytest.raises(CertificateError, match=f"id {at} of row 2 is {two.ids[at] + 1} "):
        check(base, [one, replace(two, ids=[*two.ids[:at], two.ids[at] + 1, *two.ids[at + 1 :]])])


def test_where_a_user_writes_special_tokens_each_text_is_checked_by_itself(tiny, rows):
    base = open_base(tiny.path)
    row = encoded(base, rows)[0]
    at = row.learned.index(True)
    letters = [base.tokenizer.encode(letter).ids[0] for letter in "Done."]
    merged = [i for i, learned in zip(row.ids, row.learned, strict=True) if learned][:-1]
    assert len(merged) < len(letters)
    with pytest.raises(CertificateError, match=f"id {at + 1} of row 1 is .* b'o', in llama.cpp .* b'on'"):
        check(base, [replace(row, ids=[*row.ids[:at], *letters, *row.ids[at + len(merged) :]])])


def test_a_difference_is_exit_code_3(tiny, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "tokenize_text", lambda *_, **__: Tokenized("Turn on", [80, 81]))
    assert run(["tokenize", str(tiny.path), "--text", "Turn on", "--check"]) == 3
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "id 0 is 80 " in shown.err


class Stub:
    """A llama.cpp that reads a control token by itself, and knows the plain texts it was given."""

    def __init__(self, base: Base, plain: dict[str, Sequence[int]]) -> None:
        self.control, self.plain = base.tokenizer.control, plain

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        return [self.control[text]] if parse_special else list(self.plain[text])


@pytest.mark.parametrize(("theirs", "position"), [([80, 81], None), ([80, 82], 2), ([80], 2), ([80, 81, 82], 3)])
def test_positions_count_over_the_whole_prompt(tiny, theirs, position):
    """llama.cpp is asked for the very text of each part, which ids need not spell: an unknown character has none."""
    base = open_base(tiny.path)
    start, end = base.tokenizer.control["<|im_start|>"], base.tokenizer.control["<|im_end|>"]
    said = "<|im_end|> \U000f0000"
    row = Tokenized("", [start, 80, 81, end], [False] * 4, (start, said, end))
    found = difference_of_chat(base.tokenizer, Stub(base, {said: theirs}), row)
    assert (found.position if found else None) == position


def test_a_conversation_is_cut_where_its_template_wrote_special_tokens(tiny, rows):
    base = open_base(tiny.path)
    start, end = base.tokenizer.control["<|im_start|>"], base.tokenizer.control["<|im_end|>"]
    assert encoded(base, rows)[0].parts == (
        start, "user\nTurn it <|im_end|> on", end, "\n", start, "assistant\nDone.", end, "\n",
    )  # fmt: skip


def test_a_conversation_is_rendered_no_more_often_than_for_training(tiny, rows, monkeypatch):
    base, rendered = open_base(tiny.path), []
    original = ChatTemplate.render

    def counted(template: ChatTemplate, *arguments: object, **options: object) -> object:
        rendered.append(arguments)
        return original(template, *arguments, **options)

    monkeypatch.setattr(ChatTemplate, "render", counted)
    conversation = read_conversations(rows)[1]
    encode_conversation(conversation, base.tokenizer, base.template)
    n_rendered = len(rendered)
    pipeline.tokenize_chat(base.tokenizer, base.template, conversation)
    assert len(rendered) == 2 * n_rendered > 0


# -- what people see ----------------------------------------------------------------------------------------------


def test_elsewhere_than_on_a_terminal_a_token_is_a_line(tiny, rows, capsys):
    assert run(["tokenize", str(tiny.path), "--text", "a\n\x1b b"]) == 0
    shown = capsys.readouterr()
    pieces = [line.split("\t")[1] for line in shown.out.splitlines()]
    assert "".join(piece[1:-1] for piece in pieces) == r"a\n\x1b b"
    assert shown.err.startswith(f"{len(pieces)} tokens for 5 bytes; ")
    assert run(["tokenize", str(tiny.path), "--chat", str(rows)]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0].endswith('"<|im_start|>"\tspecial')
    assert any(line.endswith('"<|im_end|>"\tspecial\tloss') for line in lines)
    assert any(line.endswith('"."\tloss') for line in lines)
    ids = [[int(line.split("\t")[0]) for line in row.splitlines()] for row in shown.out.split("\n\n")]
    assert ids == [row.ids for row in encoded(open_base(tiny.path), rows)]
    assert [line.split(":")[0] for line in shown.err.splitlines()] == ["row 1", "row 2"]


def test_a_pipe_gets_every_token(tiny, rows, capsys, monkeypatch):
    monkeypatch.setattr(command, "MOST_SHOWN", 5)
    for arguments in (["--text", "0123456789"], ["--chat", str(rows)]):
        assert run(["tokenize", str(tiny.path), *arguments]) == 0
        n_lines = sum(map(bool, capsys.readouterr().out.splitlines()))
        assert n_lines == sum(row["n_tokens"] for row in shown(capsys, tiny.path, *arguments)["rows"]) > 5


def test_one_text_is_no_progress(tiny, rows, capsys):
    assert run(["tokenize", str(tiny.path), "--text", "Turn on", "--check"]) == 0
    err = capsys.readouterr().err.splitlines()
    assert [line.split(" ")[1] for line in err] == ["tokens", "llama.cpp"]
    assert run(["tokenize", str(tiny.path), "--chat", str(rows), "--check"]) == 0
    assert "check 1/2" in capsys.readouterr().err


@pytest.mark.parametrize("width", [20, 40, 80])
def test_on_a_terminal_ids_stand_below_their_pieces(tiny, width):
    base = open_base(tiny.path)
    tokens = list(tokens_of(base, tokenize_text(base, TEXT * 3)))
    lines = [line.plain for line in command._two_lines(tokens, width)]
    assert all(cell_len(line) <= width for line in lines)
    ids, pieces = [], []
    for above, below in zip(lines[::2], lines[1::2], strict=True):
        ids += map(int, below.split())
        pieces += above.split(" ")
        starts = [i for i, (before, c) in enumerate(pairwise(f" {below}")) if before == " " != c]
        columns = [cell_len(above[:i]) for i in range(len(above))]
        assert set(starts) <= {*columns}
    assert ids == [token.id for token in tokens]
    assert [piece for piece in pieces if piece] == [visible(token.piece, blank="␣") for token in tokens]


def test_a_line_ends_where_the_text_ends_one(tiny):
    base = open_base(tiny.path)
    lines = [line.plain.rstrip() for line in command._two_lines(tokens_of(base, tokenize_text(base, "a\nb")), 80)]
    assert [line.split() for line in lines[::2]] == [["a", r"\n"], ["b"]]


def test_special_tokens_and_loss_look_different(tiny, rows):
    base = open_base(tiny.path)
    tokens = list(tokens_of(base, encoded(base, rows)[0]))
    styles = {command._style(token) for token in tokens}
    assert len(styles) == 4  # plain, special, with loss, and both
    assert command._style(tokens[0]) == command.SPECIAL


@pytest.fixture
def terminal(monkeypatch):
    """A standard output that says it is a terminal; five tokens are enough for it."""
    console = partial(Console, force_terminal=True, color_system=None, width=80)
    monkeypatch.setattr(display, "output", lambda: console(file=sys.stdout))
    monkeypatch.setattr(command, "MOST_SHOWN", 5)


@pytest.mark.usefixtures("terminal")
def test_a_terminal_is_not_flooded(tiny, rows, capsys):
    assert run(["tokenize", str(tiny.path), "--text", "0123456789"]) == 0
    heading, above, below, more = capsys.readouterr().out.splitlines()
    assert heading.startswith("10 tokens for 10 bytes")
    assert (above.split(), len(below.split())) == (list("01234"), 5)
    assert more == "… 5 more tokens; --json prints all"
    assert run(["tokenize", str(tiny.path), "--chat", str(rows)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("row 1: ")
    assert lines[-2] == "… 1 more row; --json prints all"
    assert len(shown(capsys, tiny.path, "--text", "0123456789")["rows"][0]["ids"]) == 10


@pytest.mark.usefixtures("terminal")
def test_rows_are_encoded_only_as_far_as_they_are_shown(make_tiny, rows, capsys):
    assert run(["tokenize", str(make_tiny(template=STRICT).path), "--chat", str(rows)]) == 0
    assert "1 more row" in capsys.readouterr().out  # the one that its template refuses


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b", "a b"), ("\n\t\r", r"\n\t\r"), ("\\n", r"\\n"), ("\x1b[31m", r"\x1b[31m"), ("é日🙂", "é日🙂"),
        ("\u202e", r"\u202e"), ("\xa0", r"\u00a0"), (b"\xe6\x97", r"\xe6\x97"), ("é".encode(), "é"), (b"\0", r"\x00"),
    ],
)  # fmt: skip
def test_visible(text, expected):
    assert visible(text) == expected


@given(st.binary(max_size=12))
def test_two_pieces_never_look_alike(raw):
    assert visible(raw).isprintable()
    back = visible(raw).encode("latin-1", "backslashreplace").decode("unicode_escape")
    assert visible(raw) != visible(raw + b"\n")
    if raw.isascii():
        assert back.encode() == raw
