"""What a person sees of a run on a terminal and elsewhere, and what a program hears of it."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import fields, replace

import pytest
from conftest import ROOT
from rich.console import Console, Group

from edgelora.cli import display as module
from edgelora.cli.display import Display, describe, drawn, duration, listener
from edgelora.errors import ConfigError
from edgelora.progress import Progress, Sample

STEP = Progress(
    "train", 12, 116, loss=0.14627, learning_rate=1.9e-4, tokens_per_s=285.4, eta_s=161.0, peak_bytes=1_122_000_000,
    epoch=0.207, smoothed_loss=0.16249, grad_norm=0.7123, skipped_steps=1,
)  # fmt: skip
PREFERRED = {
    "rewards/chosen": 0.2131,
    "rewards/rejected": -0.1012,
    "rewards/margins": 0.3143,
    "rewards/accuracies": 0.75,
}
HUGE = replace(
    STEP, step=123_456, total=999_999, loss=123.456, smoothed_loss=123.456, eta_s=10**7, epoch=123.45,
    grad_norm=123_456.0, tokens_per_s=123_456.0, peak_bytes=10**12, skipped_steps=12_345,
)  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


class Terminal(io.StringIO):
    """What says of itself that people look at it."""

    def isatty(self):
        return True


@pytest.fixture
def terminal():
    """A display on a terminal of 80 columns, and what is written to it."""
    shown = Display()
    shown.console = Console(file=Terminal(), force_terminal=True, width=80, color_system=None, highlight=False)
    return shown


def lines(text, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(Group(text))  # as Live draws it; a text alone would be joined to a new one, which may wrap
    return console.file.getvalue().splitlines()


# -- on a terminal ------------------------------------------------------------------------------------------------


def test_the_live_lines_say_everything():
    assert lines(drawn(STEP, STEP, held_out=0.17149)) == [
        "━━━━━━━━━━━━━━━━━━━━━━━━  train 12/116 · epoch 0.21 · 2:41 left",
        "loss 0.146 · smoothed 0.162 · held-out 0.171 · lr 1.9e-04 · grad 0.712",
        "285 tokens/s · peak 1122 MB · 1 step skipped",
    ]


def test_a_preference_objective_has_a_line_of_its_own():
    shown = lines(drawn(STEP, replace(STEP, numbers=PREFERRED)))
    assert shown[2] == "chosen +0.213 · rejected -0.101 · margin +0.314 · accuracy 75%"
    assert [shown[0], shown[1], shown[3]] == lines(drawn(STEP, STEP))
    assert "margin +0.314" in describe(replace(STEP, numbers=PREFERRED))


def test_an_evaluation_says_what_rows_held_out_are_preferred(capsys):
    with Display() as display:
        display.show(replace(STEP, held_out_loss=0.5, held_out_numbers=PREFERRED))
    said = "held-out 0.5000 · chosen +0.213 · rejected -0.101 · margin +0.314 · accuracy 75%"
    assert any(said in line for line in capsys.readouterr().err.splitlines())


@pytest.mark.parametrize("width", [80, 120])
def test_the_largest_numbers_fit(width):
    shown = lines(drawn(HUGE, HUGE, held_out=123.456), width)
    assert len(shown) == 3
    assert not any("…" in line for line in shown)


def test_a_narrow_terminal_cuts_and_never_wraps():
    shown = lines(drawn(HUGE, HUGE, held_out=123.456, width=40), 40)
    assert len(shown) == 3
    assert all(len(line) <= 40 for line in shown)


@pytest.mark.parametrize(("width", "bar"), [(40, 0), (56, 10), (80, 24), (200, 24)])
def test_the_bar_leaves_room_for_how_far_it_is(width, bar):
    shown = lines(drawn(STEP, STEP, width=width), width)
    assert shown[0].count("━") == bar
    assert shown[0].endswith("train 12/116 · epoch 0.21 · 2:41 left")


@pytest.mark.parametrize(("name", "value", "file"), [("FORCE_COLOR", "1", io.StringIO), ("TERM", "dumb", Terminal)])
def test_lines_are_plain_where_nothing_can_change_in_place(monkeypatch, name, value, file):
    monkeypatch.setenv(name, value)
    written = file()
    monkeypatch.setattr("sys.stderr", written)
    with Display() as display:
        display.show(STEP)
    assert re.sub(r"\x1b\[[0-9;]*m", "", written.getvalue()).startswith("train 12/116 · epoch 0.21 · 2:41 left")
    assert "\x1b[?25" not in written.getvalue()  # no cursor is hidden


def test_an_evaluation_inside_a_training_leaves_its_numbers_where_they_are():
    during = lines(drawn(Progress("evaluate", 3, 8, eta_s=5.0), STEP))
    assert during[0].endswith("  evaluate 3/8 · 0:05 left")
    assert during[1:] == lines(drawn(STEP, STEP))[1:]


@pytest.mark.parametrize(("step", "green"), [(0, 0), (58, 12), (116, 24), (200, 24)])
def test_the_bar_is_as_long_as_the_job_is_far(step, green):
    spans = [span for span in drawn(replace(STEP, step=step), None).spans if span.style == "green"]
    assert sum(span.end - span.start for span in spans) == green


def test_a_terminal_keeps_evaluations_and_answers_above_the_live_lines(terminal):
    with terminal as display:
        display.show(STEP)
        display.show(replace(STEP, step=13, held_out_loss=0.1714, best=True, samples=(Sample("Hi", "Ho\nho", False),)))
        display.show(replace(STEP, step=14))
        display.say("done")
    written = terminal.console.file.getvalue()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written).replace("\r", "\n").splitlines()
    assert "train 13/116 · epoch 0.21 · smoothed 0.1625 · held-out 0.1714 (best)" in plain
    assert "  Hi → Ho\\nho…" in plain
    assert "✓ done" in plain
    assert written.count("\x1b[?25h") == 1  # the cursor is back
    assert all(len(line) <= 80 for line in plain)


def test_the_last_held_out_loss_stays_until_another_training_begins(terminal):
    terminal._live = None
    terminal.show(replace(STEP, held_out_loss=0.5))
    assert "held-out 0.500" in describe(STEP, terminal._held_out)
    terminal.show(replace(STEP, step=13))
    assert terminal._held_out == 0.5
    terminal.show(replace(STEP, step=1))
    assert terminal._held_out is None


def test_what_a_model_says_cannot_move_the_cursor(terminal):
    with terminal as display:
        display.show(replace(STEP, samples=(Sample("Hi\x1b[2J", "\x1b[31mred\x07"),)))
    assert "  Hi\\x1b[2J → \\x1b[31mred\\x07" in terminal.console.file.getvalue()


# -- elsewhere ----------------------------------------------------------------------------------------------------


def test_a_plain_line_now_and_then_and_for_each_evaluation(capsys, clock):
    with Display() as display:
        for step in range(1, 41):
            clock[0] += 1.0
            held_out = {"held_out_loss": 0.25, "best": False} if step == 20 else {}
            display.show(Progress("train", step, 40, loss=0.5, smoothed_loss=0.5, **held_out))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "train 1/40 · loss 0.500 · smoothed 0.500",
        "train 17/40 · loss 0.500 · smoothed 0.500",
        "train 20/40 · smoothed 0.5000 · held-out 0.2500",
        "train 36/40 · loss 0.500 · smoothed 0.500 · held-out 0.250",
    ]


@pytest.mark.usefixtures("clock")
def test_what_is_measured_before_the_first_step_is_said_once(capsys):
    with Display() as display:
        display.show(Progress("train", 0, 40, epoch=0.0, held_out_loss=3.25))
        display.show(Progress("train", 1, 40, loss=3.0))
    assert capsys.readouterr().err.splitlines() == ["train 0/40 · epoch 0.00 · held-out 3.2500"]


@pytest.mark.usefixtures("clock")
def test_what_comes_behind_a_training_has_no_held_out_loss(capsys):
    shown = Display()
    shown.show(replace(STEP, held_out_loss=0.17149))
    shown.say("trained")
    shown.show(Progress("quantize", 1, 272, eta_s=6.0))
    *_, last = capsys.readouterr().err.splitlines()
    assert last == "quantize 1/272 · 0:06 left"


def test_each_stage_is_said_when_it_begins_and_again_for_the_next_file(capsys):
    with Display() as display:
        for stage in ("merge", "merge", "check", "merge"):
            display.show(Progress(stage, 1, 2))
        display.say("a.gguf: done")
        display.show(Progress("merge", 1, 2))
        display.note("[b] is no markup")
    assert capsys.readouterr().err.splitlines() == [
        "merge 1/2", "check 1/2", "✓ a.gguf: done", "merge 1/2", "note: [b] is no markup",
    ]  # fmt: skip


def test_a_long_line_is_one_line_in_a_file(capsys):
    with Display() as display:
        display.show(HUGE)
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0:00"), (59.4, "0:59"), (161, "2:41"), (3599.6, "1:00:00"), (3761, "1:02:41"), (263_000, "3 d 1:03")],
)
def test_a_duration_in_words(seconds, expected):
    assert duration(seconds) == expected


# -- a program ----------------------------------------------------------------------------------------------------


def test_json_lines_are_an_object_each_on_stderr(capsys):
    with listener(as_json=True) as events:
        events.show(replace(STEP, loss=math.nan, samples=(Sample("Hi", "a\nb"),), numbers={"rewards/margins": 0.5}))
        events.say("done\n")
        events.choice("rank", "16", "its paper's")
        events.note("odd")
        events.error(ConfigError("what", "why", "fix"))
    shown = capsys.readouterr()
    assert shown.out == ""
    first, *others = [json.loads(line) for line in shown.err.splitlines()]
    assert (first["event"], first["stage"], first["step"], first["loss"]) == ("progress", "train", 12, None)
    assert first["samples"] == [{"prompt": "Hi", "text": "a\nb", "ended": True}]
    assert first["numbers"] == {"rewards/margins": 0.5}
    assert others == [
        {"event": "said", "text": "done\n"},
        {"event": "choice", "name": "rank", "value": "16", "why": "its paper's"},
        {"event": "note", "text": "odd"},
        {"event": "error", "what": "what", "why": "why", "fix": "fix"},
    ]


def test_the_page_of_events_knows_every_field():
    page = (ROOT / "docs" / "events.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in page.splitlines() if line[:1] == "|")))
    assert told == {f.name for f in fields(Progress)} | {"event", "choice", "note", "progress", "said", "error"}


def test_a_person_gets_the_display():
    assert isinstance(listener(as_json=False), Display)
