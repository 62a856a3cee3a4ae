"""`edgelora data check` as a command: what it prints, what it hands on, and that it refuses what `train` would."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from test_data_check import GOOD, write
from test_data_check import row as chat
from typer.testing import CliRunner

from edgelora.base.model import open_base
from edgelora.cli import app, display
from edgelora.cli import data as command
from edgelora.data.check import histogram
from edgelora.data.fit import Encoder
from edgelora.data.formats import parse_row
from edgelora.errors import BaseModelError, DataError
from edgelora.pipeline.data import Ask, check_data


@pytest.fixture(scope="module")
def base(tiny):
    return open_base(tiny.path)


PREFERRED = {"prompt": "p", "chosen": "light on", "rejected": "lamp off"}


def run(*arguments):
    return CliRunner().invoke(command.app, ["check", *map(str, arguments)])


# -- what training would refuse -----------------------------------------------------------------------------------


@pytest.mark.parametrize("held_out", [False, True])
def test_rows_of_another_objective_are_refused_wherever_they_stand(base, tmp_path, held_out):
    rows, other = write(tmp_path / "a.jsonl", *GOOD), write(tmp_path / "b.jsonl", PREFERRED)
    done = run(rows, *["--valid"] * held_out, other, "--base", base.path)
    assert isinstance(done.exception, DataError)
    assert str(done.exception).splitlines() == [
        f"{other}:1: a row of the format preference",
        "  why: the first are conversations, documents and token ids: no run learns from both",
        "  fix: leave this file to another run",
    ]


def test_preferences_in_all_files_are_for_one_run(base, tmp_path):
    first, second, valid = (write(tmp_path / f"{n}.jsonl", {**PREFERRED, "prompt": n}) for n in "abc")
    done = run(first, second, "--valid", valid, "--base", base.path)
    assert done.exit_code == 0, done.output
    assert "format    preference (2)" in done.output


def test_held_out_rows_that_teach_nothing_are_refused(base, tmp_path):
    rows, masked = write(tmp_path / "a.jsonl", *GOOD), write(tmp_path / "b.jsonl", chat("hi", "light on", weight=0))
    done = run(rows, "--valid", masked, "--base", base.path)
    assert isinstance(done.exception, DataError)
    assert done.exception.what == "held-out data: no row has a token to learn: all labels are masked"
    assert f"! held-out: 1 row with nothing to learn, left out ({masked}:1)" in done.output


# -- what is handed on --------------------------------------------------------------------------------------------

# by its keys a rated answer, for kto; two answers
RATED = {
    "prompt": "how warm?",
    "completion": [*chat("", "it is 21.5", "and now?", "light off")["messages"][1:]],
    "label": True,
}


def checked(*arguments):
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def learned(base, row, **how):
    """How many tokens of a row are learned."""
    return Encoder(base, **how).encode(parse_row(row, "completion")[1]).examples[0].n_loss_tokens


def test_the_format_that_was_named_is_read(base, tmp_path):
    rows = write(tmp_path / "rows.jsonl", RATED)
    assert checked(rows, "--base", base.path)["formats"] == {"kto": 1}
    assert checked(rows, "--base", base.path, "--data-format", "completion")["formats"] == {"completion": 1}
    assert checked(rows, "--valid", rows, "--base", base.path, "--data-format", "completion")["valid"]["formats"] == {
        "completion": 1
    }


@pytest.mark.parametrize("which", ["all", "last"])
def test_the_answers_that_were_named_are_learned(base, tmp_path, which):
    rows = write(tmp_path / "rows.jsonl", RATED)
    found = checked(rows, "--base", base.path, "--data-format", "completion", "--loss-on", which, "--preview", 1)
    assert found["loss_tokens"] == learned(base, RATED, loss_on=which)
    said = [text for text, is_learned in found["preview"][0]["examples"][0] if is_learned]
    assert said == ["it is 21.5<|im_end|>", "light off<|im_end|>"][which == "last" :]


def test_a_base_without_a_template_speaks_by_the_one_that_was_named(make_tiny, tmp_path):
    untaught, rows = make_tiny(template=None).path, write(tmp_path / "rows.jsonl", *GOOD)
    assert isinstance(run(rows, "--base", untaught).exception, BaseModelError)
    shown = checked(rows, "--base", untaught, "--chat-template", "chatml", "--preview", 1)["preview"]
    assert "".join(text for text, _ in shown[0]["examples"][0]).startswith("<|im_start|>user\nturn on the light<|im_")
    jinja = tmp_path / "own.jinja"
    jinja.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", encoding="utf-8")
    shown = checked(rows, "--base", untaught, "--chat-template", jinja, "--preview", 1)["preview"]
    assert "".join(text for text, _ in shown[0]["examples"][0]).startswith("user: turn on the light\nassistant: ")


def test_train_is_handed_the_same(base, tmp_path):
    """The weight of a file, the format and the answers that are learned, from the command line into a run."""
    rows, out = write(tmp_path / "rows.jsonl", RATED, RATED | {"prompt": "how cold?"}), tmp_path / "mine"
    words = f"train {base.path} {rows}:3 --out {out} --data-format completion --loss-on last --rank 1 --batch-rows 2"
    done = CliRunner().invoke(app, [*words.split(), "--epochs", "1", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 3  # 2 rows, each three times, by twos
    read = json.loads((tmp_path / "mine.run" / "run.json").read_text(encoding="utf-8"))["data"]
    assert (read["formats"], read["loss_tokens"]) == ({"completion": 2}, 2 * learned(base, RATED, loss_on="last"))


# -- what is printed ----------------------------------------------------------------------------------------------


def lines(*arguments):
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    return done.output.splitlines()


def test_the_lines_say_what_was_counted(base, tmp_path):
    one_token = [chat(question, "a") for question in "qrs"]
    long = [chat("a", "light on " * 20, "b", "light off", "c", "it is 21.5"), chat("d", "light on", "e", "on " * 60)]
    rows = write(tmp_path / "rows.jsonl", *GOOD, *one_token, *long)
    c = check_data(base, [rows], ask=Ask(max_length=40)).check
    assert (c.one_token, c.cut, c.lost_turns, c.lost_ends) == (3, 2, 3, 1)
    told = lines(rows, "--base", base.path, "--max-length", 40)
    assert told[:6] == [
        "format    chat (8)",
        "rows      8",
        f"tokens    {c.tokens:,}, of which {c.loss_share:.1%} are learned ({c.loss_tokens:,})",
        "answers   3 of one token",
        f"too long  2 rows over 40 tokens: --truncate takes {c.lost_tokens} tokens, 3 whole answers and the end of 1",
        "tokens of a row",
    ]
    bars = [line for line in told if "█" in line]
    assert [line.split() for line in bars] == [
        [f"{low}", "–", f"{high}", "█" * -(-n * 40 // max(c for *_, c in histogram(c.lengths))), f"{n}"]
        for low, high, n in histogram(c.lengths) if n
    ]  # fmt: skip


def test_what_is_odd_in_held_out_rows_is_said(base, tmp_path):
    rows, valid = write(tmp_path / "a.jsonl", *GOOD), write(tmp_path / "b.jsonl", chat("x", "on"), chat("x", "on"))
    warnings = [line for line in lines(rows, "--valid", valid, "--base", base.path) if line.startswith("! ")]
    assert warnings == [f"! held-out: 1 row the same as an earlier one ({valid}:2)"]


def test_on_a_terminal_what_is_learned_is_green(base, tmp_path, monkeypatch):
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, color_system="standard", highlight=False)
    monkeypatch.setattr(display, "output", lambda: console)
    assert run(write(tmp_path / "a.jsonl", *GOOD), "--base", base.path, "--preview", 1).exit_code == 0
    said = written.getvalue()
    assert "\x1b[32mlight on<|im_end|>\x1b[0m" in said
    assert "\x1b[2mturn on the light<|im_end|>\x1b[0m" in said
    assert "⟦" not in said
