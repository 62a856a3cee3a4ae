"""How long a run takes, reckoned before it starts: its steps, and what is measured between them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from edgelora.cli import run
from edgelora.config import TrainConfig
from edgelora.pipeline import plan as module
from edgelora.pipeline.plan import Estimate, estimate, lines, plan_run
from edgelora.training.run import run_training

EXAMPLES = (ROOT / "examples" / "home" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """(12 rows to learn, 9 rows held out), and of those to learn one is there twice, which is odd."""
    rows, valid = tmp_path / "rows.jsonl", tmp_path / "valid.jsonl"
    rows.write_text("".join([*EXAMPLES[:11], EXAMPLES[0]]), encoding="utf-8")
    valid.write_text("".join(EXAMPLES[20:29]), encoding="utf-8")
    return rows, valid


class Clock:
    """Goes on by a second whenever it is looked at: a step takes one."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1.0
        return self.now


@pytest.mark.parametrize("measured_rows", [64, 4])
def test_measurements_are_a_part_of_the_time(tiny, files, tmp_path, monkeypatch, measured_rows):
    """Six steps, measured before the first and behind every second one: four passes and four rounds of answers."""
    clock, real, taken = Clock(), module.held_out, []
    monkeypatch.setattr(module, "MEASURED_ROWS", measured_rows)

    def passes(objective: Any, decoder: Any, rows: Any, *more: Any) -> Any:
        clock.now += sum(map(len, rows)) - 1.0  # a second for each token
        taken.append(len(rows))
        return real(objective, decoder, rows, *more)

    answers = module.Sampler.__call__

    def answer(self: Any, decoder: Any) -> Any:
        clock.now += 15.0
        return answers(self, decoder)

    config = TrainConfig(
        base=tiny.path, data=files[0], valid=files[1], out=tmp_path / "mine", rank=2, batch_rows=4, epochs=2,
        eval_every=2, samples=["Lock the door"],
    )  # fmt: skip
    base, found = plan_run(config)
    with monkeypatch.context() as patch:
        patch.setattr(module, "held_out", passes)
        patch.setattr(module.Sampler, "__call__", answer)
        patch.setattr(module, "time", clock)
        _, timed = estimate(found, base)
    n_tokens = module.load_rows(found.config, base, lambda _: None).valid.n_tokens
    assert taken == [9 if measured_rows == 64 else 3]  # at equal distances
    assert (timed.steps, timed.measurements) == (6, 4)
    assert timed.seconds_held_out == pytest.approx(n_tokens)
    assert timed.seconds_samples == 16.0 * module.MAX_TOKENS / module.MEASURED_TOKENS
    assert timed.seconds == pytest.approx(6 + 4 * (timed.seconds_held_out + timed.seconds_samples))
    said = dict(lines(found, timed))["of it measurements"]
    assert said == f"4 of {n_tokens:.2f} s for rows held out, 128.00 s at most for samples"


def test_without_them_it_is_the_time_of_the_steps():
    assert Estimate(12, 6, 0.5, 100.0).seconds == 3.0


def test_the_steps_that_are_timed_are_those_of_the_run(tiny, files, tmp_path, monkeypatch):
    """With all that is drawn and cut in a step: to the bit."""
    config = TrainConfig(
        base=tiny.path, data=files[0], out=tmp_path / "mine", rank=2, batch_rows=4, epochs=2, dtype="f32",
        lora_dropout=0.3, neftune_alpha=5.0, max_grad_norm=0.01, warmup_steps=2, learning_rate=0.01,
    )  # fmt: skip
    timed: list[Any] = []
    stepped = module._StopWatch.stepped

    def heard(self: Any, progress: Any, *more: Any) -> None:
        timed.append(progress)
        stepped(self, progress, *more)

    monkeypatch.setattr(module._StopWatch, "stepped", heard)
    base, found = plan_run(config)
    assert estimate(found, base)[1].steps == 6
    ran: list[Any] = []
    run_training(config, ran.append)
    assert len(timed) == 1 + module.MEASURED_STEPS
    assert [(p.loss, p.grad_norm, p.learning_rate) for p in timed] == [
        (p.loss, p.grad_norm, p.learning_rate) for p in ran[: len(timed)]
    ]
    assert timed[1].grad_norm > config.max_grad_norm  # it was cut


def test_the_command_counts_the_measurements_that_the_run_makes(tiny, files, tmp_path, capsys):
    rows, valid = files
    words = ["--rank", "2", "--batch-rows", "4", "--valid", str(valid), "--eval-every", "2"]
    assert run(["plan", str(tiny.path), str(rows), *words, "--json"]) == 0
    shown = capsys.readouterr()
    timed = json.loads(shown.out)["time"]
    heard: list[Any] = []
    config = TrainConfig(base=tiny.path, data=rows, valid=valid, out=tmp_path / "a", rank=2, batch_rows=4, eval_every=2)
    run_training(config, heard.append)
    assert timed["measurements"] == sum(p.held_out_loss is not None for p in heard)
    assert timed["seconds_held_out"] > 0 == timed["seconds_samples"]
    assert timed["seconds"] == pytest.approx(
        timed["steps"] * timed["seconds_per_step"] + timed["measurements"] * timed["seconds_held_out"]
    )


def test_a_recipe_is_planned_before_there_are_rows_to_hold_out(tiny):
    recipe = ROOT / "examples" / "recipes" / "short-answers.toml"
    assert run(["plan", str(tiny.path), "--config", str(recipe)]) == 0


def test_what_is_odd_about_the_rows_is_said(tiny, files, capsys):
    assert run(["plan", str(tiny.path), str(files[0]), "--rank", "2", "--batch-rows", "4"]) == 0
    shown = capsys.readouterr()
    assert "note: " in shown.err
    assert "12 rows" in shown.out
    assert "measurements" not in shown.out
