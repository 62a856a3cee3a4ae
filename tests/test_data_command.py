"""`edgelora data check` as a command: what it prints, what it hands on, and that it refuses what `train` would."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from edgelora.base.model import open_base
from edgelora.cli import data as command
from edgelora.errors import DataError


@pytest.fixture(scope="module")
def base(tiny):
    return open_base(tiny.path)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(*contents, weight=1.0):
    turns = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(contents)]
    return {"messages": [{**t, "weight": weight} if t["role"] == "assistant" else t for t in turns]}


GOOD = [chat("turn on the light", "light on"), chat("turn it off", "light off"), chat("how warm?", "it is 21.5")]
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
