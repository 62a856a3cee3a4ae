"""A run that was stopped, however and wherever, ends in the curve and the adapter of the run that nobody stopped."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TEMPLATE
from example_runs import example_rows
from forked import Forked
from gguf.constants import GGMLQuantizationType as Type
from resumed import cut_back, kill, outcome, require_same_when_resumed, run_folder
from test_atomic import Disk, tree

from edgelora import cli
from edgelora.cli.train import better_before
from edgelora.config import TrainConfig
from edgelora.errors import ConfigError, EdgeloraError, FileFormatError, OutputError
from edgelora.files.lock import locked
from edgelora.files.manifest import MANIFEST, write_manifest
from edgelora.kernels import load
from edgelora.peft import pissa
from edgelora.peft.methods import METHODS
from edgelora.training import loop, ready, run
from edgelora.training.checkpoint import checkpoint_path, read_checkpoint, write_checkpoint
from edgelora.training.interrupt import STOPPING, at_once
from edgelora.training.interrupt import Stopped as AskedToStop
from edgelora.training.metrics import as_line, read_metrics
from edgelora.training.run import run_training

STEPS = 12  # 24 rows, four a step, two epochs: an epoch ends at step 6
WORSE = {"learning_rate": 0.05, "schedule": "constant", "max_steps": 4}  # good at its first step, at half of that rate
KILLS = 30  # benchmarks/kill.py does 200, on a real model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(24 rows to learn, 4 rows held out) of the example commands."""
    folder = tmp_path_factory.mktemp("data")
    return example_rows(folder / "train.jsonl", 0, 24), example_rows(folder / "valid.jsonl", 24, 28)


@pytest.fixture(scope="module")
def settings(make_tiny: Callable[..., Any], data: tuple[Path, Path]) -> Callable[..., TrainConfig]:
    """`settings(out, **changes)`: twelve steps over the Q8_0 model, a checkpoint after each, all of them kept."""

    def make(out: Path, **changes: Any) -> TrainConfig:
        defaults = {
            "base": make_tiny(Type.Q8_0).path, "data": data[0], "valid": data[1], "learning_rate": 5e-3,
            "rank": 4 if METHODS[changes.get("method", "lora")].ranked else None, "warmup_steps": 2,
            "epochs": 2, "batch_rows": 4, "micro_batch_tokens": 64, "eval_every": 5, "save_every": 1,
            "keep_checkpoints": 1000,
        }  # fmt: skip
        return TrainConfig(**{**defaults, "out": out, **changes})

    return make


@pytest.fixture(scope="module")
def pairs(data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows, the answer of each better than that of the row before it."""
    spoken = [json.loads(row)["messages"] for row in data[0].read_text(encoding="utf-8").splitlines()]
    made = [{"prompt": m[:-1], "chosen": m[-1:], "rejected": spoken[i - 1][-1:]} for i, m in enumerate(spoken)]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


def shown_numbers(out: Path) -> list[dict[str, float]]:
    """What the objective said of each step beside its loss."""
    return [dict(line.numbers) for line in read_metrics(run_folder(out) / "metrics.jsonl")]


def alter_checkpoint(out: Path, step: int) -> None:
    """Turn one bit in the middle of it around."""
    path = checkpoint_path(run_folder(out) / "checkpoints", step) / "state.safetensors"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


class Stopped(Exception):
    """What a listener raises to end a run at a step, as a fault of the program would."""


def stop_after(step: int) -> Callable[[Any], None]:
    def listen(progress: Any) -> None:
        if progress.stage == "train" and progress.step == step:
            raise Stopped

    return listen


@pytest.fixture(scope="module")
def whole(settings: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a run that nobody stopped; its folder is copied, never changed."""
    out = tmp_path_factory.mktemp("whole") / "mine"
    run_training(settings(out))
    assert [line.step for line in read_metrics(run_folder(out) / "metrics.jsonl")] == list(range(STEPS + 1))
    return out


@pytest.fixture
def again(whole: Path, tmp_path: Path) -> Path:
    """A copy of the uninterrupted run."""
    shutil.copytree(whole.parent, tmp_path / "again")
    return tmp_path / "again" / whole.name


# -- resumed = uninterrupted --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step", [1, 2, 4, 5, 6, 7, 11, STEPS],
    ids=["the first", "warm-up's end", "mid-epoch", "evaluated", "an epoch's end", "after it", "last but one", "all"],
)  # fmt: skip
def test_a_resumed_run_is_the_uninterrupted_one(settings, whole, again, step):
    cut_back(again, step)
    heard: list[int] = []
    run_training(settings(again, resume=True), lambda p: heard.append(p.step) if p.loss is not None else None)
    assert min(heard, default=STEPS + 1) == step + 1  # nothing is computed twice
    assert outcome(again) == outcome(whole)


# what a step depends on beside the weights: each must come back
WAYS: dict[str, dict[str, Any]] = {
    "lion, noise and a moving average": {"optimizer": "lion", "neftune_alpha": 5.0, "ema_decay": 0.9},
    "dora, adafactor and smoothing": {"method": "dora", "optimizer": "adafactor", "label_smoothing": 0.1},
    "loraplus and a cosine, cut": {"method": "loraplus", "schedule": "cosine", "max_steps": 8, "recompute": "full"},
    "dylora and noise": {"method": "dylora", "neftune_alpha": 5.0, "max_steps": 8},
    "dropout, a pattern and layers computed again": {
        "lora_dropout": 0.2, "rank_pattern": ["q_proj=2"], "recompute": "full", "max_steps": 4,
    },
    "adalora": {"method": "adalora", "max_steps": 8},
    "vera": {"method": "vera", "max_steps": 8},
    "houlsby": {"method": "houlsby", "max_steps": 2},
    "molora": {"method": "molora", "max_steps": 2},
    "galore": {"method": "galore", "rank": 4, "alpha": 0.25, "base_dtype": "f32", "max_steps": 8},
    "pissa and a moving average": {"method": "pissa", "ema_decay": 0.9, "max_steps": 8},
    "patience": {"patience": 1, "eval_every": 1, "learning_rate": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_whatever_a_step_depends_on_comes_back(settings, tmp_path, way):
    config = settings(tmp_path / "mine", **WAYS[way])
    run_training(config)
    last = outcome(config.out).curve[-1][0]
    require_same_when_resumed(config, last // 2, last)


def test_a_start_that_was_computed_comes_back_too(settings, tmp_path, monkeypatch):
    """On another machine an SVD has other signs: what was learned belongs to those of the first."""
    config, leading = settings(tmp_path / "mine", method="pissa", max_steps=4), pissa.leading
    run_training(config)

    def of_other_signs(weight, rank, generator):
        u, s, vt = leading(weight, rank, generator)
        return -u, s, -vt

    monkeypatch.setattr(pissa, "leading", of_other_signs)
    require_same_when_resumed(config, 2)


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_a_run_goes_on_within_a_step(settings, pairs, tmp_path, monkeypatch, objective):
    """Behind the first and the last micro-batch of the second step: gradients that are summed are not summed again."""
    out, kept = tmp_path / "mine", tmp_path / "kept"
    changes = {"max_steps": 3, "neftune_alpha": 5.0}  # its noise is another in each micro-batch
    changes |= {"lora_dropout": 0.2} if objective == "sft" else {"objective": "dpo", "data": pairs, "valid": pairs}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "SAVE_EVERY_S", 0.0)  # a checkpoint after each micro-batch
        run_training(settings(out, **changes))
    wanted, numbers = outcome(out), shown_numbers(out)
    assert all(numbers[1:]) == (objective == "dpo")
    shutil.copytree(run_folder(out), kept)
    found = [read_checkpoint(path) for path in sorted((kept / "checkpoints").glob("step-00000001-*"))]
    assert [one.micro for one in found] == list(range(1, len(found) + 1))
    assert len(found) > 1
    for one in (found[0], found[-1]):
        cut_back(out, one.step, one.micro)
        run_training(settings(out, resume=True, **changes))
        assert outcome(out) == wanted, f"from micro-batch {one.micro}"
        assert shown_numbers(out) == numbers
        shutil.rmtree(run_folder(out))
        shutil.copytree(kept, run_folder(out))


def test_time_and_memory_are_those_of_all_processes(settings, again):
    """As if an earlier process had taken 1,000 s for the first six steps, and a petabyte."""
    cut_back(again, 6)
    folder, metrics = run_folder(again), run_folder(again) / "metrics.jsonl"
    found = read_checkpoint(newest(again))
    facts = {**found.facts, "state": {**found.facts["state"], "seconds": 1000.0}}
    write_checkpoint(folder / "checkpoints", replace(found, facts=facts), keep_last=1000, best=None)
    metrics.write_text("".join(as_line(replace(m, peak_bytes=10**15)) for m in read_metrics(metrics) if m.step <= 6))
    ended = run_training(settings(again, resume=True))
    result = json.loads((folder / "run.json").read_text())["result"]
    contract = json.loads((again / "edgelora.json").read_text())["training"]
    assert 1000 < ended.seconds == pytest.approx(result["seconds"], abs=0.1)
    assert ended.peak_bytes == result["peak_bytes"] == contract["peak_bytes"] == 10**15
    assert contract["seconds"] == result["seconds"]


def test_a_run_that_failed_in_the_middle_goes_on(settings, whole, tmp_path):
    out = tmp_path / "mine"
    for step in (3, 8):
        with pytest.raises(Stopped):
            run_training(settings(out, resume=True, save_every=2, keep_checkpoints=2), stop_after(step))
        assert not out.exists()
    run_training(settings(out, resume=True, save_every=2, keep_checkpoints=2))
    assert outcome(out) == outcome(whole)


def test_the_same_command_gives_the_same_adapter(settings, whole, tmp_path):
    run_training(settings(tmp_path / "mine", save_every=5, keep_checkpoints=1))
    assert outcome(tmp_path / "mine") == outcome(whole)  # saving changes nothing


def test_resume_where_nothing_is_begins_at_the_first_step(settings, whole, tmp_path):
    notes: list[str] = []
    run_training(settings(tmp_path / "mine", resume=True), on_note=notes.append)
    assert "nothing was saved here yet: the run begins at its first step" in notes
    assert outcome(tmp_path / "mine") == outcome(whole)


def test_where_no_checkpoint_is_whole_no_other_run_takes_the_place_of_this_one(settings, again):
    cut_back(again, 2)
    for step in (1, 2):
        alter_checkpoint(again, step)
    before, notes = tree(again.parent), []
    with pytest.raises(FileFormatError) as caught:
        run_training(
            TrainConfig(base=settings(again).base, data=settings(again).data, out=again, resume=True),
            on_note=notes.append,
        )
    assert caught.value.what.endswith("checkpoints: no checkpoint that stands here can be used")
    assert "--overwrite" in caught.value.fix
    assert [note.partition(":")[0] for note in notes] == ["step-00000002", "step-00000001"]
    assert unlocked(tree(again.parent)) == unlocked(before)


@pytest.mark.parametrize("step", [6, STEPS], ids=["on the way", "at the end"])
def test_a_run_goes_on_without_the_metrics_that_were_deleted(settings, again, step):
    cut_back(again, step)
    (run_folder(again) / "metrics.jsonl").unlink()
    ended = run_training(settings(again, resume=True))
    facts = json.loads((run_folder(again) / "run.json").read_text())["result"]
    assert (ended.n_steps, ended.step, len(ended.losses)) == (STEPS, STEPS, STEPS - step)
    assert (facts["steps"], facts["adapter_of_step"]) == (STEPS, STEPS)


def test_a_damaged_checkpoint_is_passed_over_and_named(settings, whole, again):
    cut_back(again, 8)
    alter_checkpoint(again, 8)
    notes: list[str] = []
    run_training(settings(again, resume=True), on_note=notes.append)
    assert (
        "step-00000008: this checkpoint is damaged (state.safetensors was altered); step-00000007 is used instead"
        in notes
    )
    assert outcome(again) == outcome(whole)


def test_what_computes_otherwise_where_a_run_goes_on_is_said_and_written_down(settings, whole, again, monkeypatch):
    """Other threads, another torch, no compiled code: the same losses but for rounding, and a run.json that says so."""
    before = json.loads((run_folder(whole) / "run.json").read_text())
    assert before["changed"] == []
    threads = int(before["choices"]["threads"]["value"])
    other = {"threads": str(threads + 1), "torch": "0.0.1", "attention": "torch"}
    monkeypatch.setenv("OMP_NUM_THREADS", other["threads"])
    monkeypatch.setattr(load, "library", lambda: None)
    monkeypatch.setattr(ready, "versions", lambda: before["versions"] | {"torch": other["torch"]})
    was = {"threads": str(threads), "torch": before["versions"]["torch"],
           "attention": before["choices"]["attention"]["value"]}  # fmt: skip
    differ = [name for name in other if was[name] != other[name]]
    assert set(differ) >= {"threads", "torch"}  # and attention, where the code is compiled
    said = {
        f"it goes on with {name} {other[name]} instead of {was[name]}: the same but for rounding" for name in differ
    }
    for step, wanted in ((6, said), (9, set())):  # the second time as the first
        cut_back(again, step)
        notes: list[str] = []
        run_training(settings(again, resume=True), on_note=notes.append)
        assert {note.partition(", unless")[0] for note in notes if "rounding" in note} == wanted
        facts = json.loads((run_folder(again) / "run.json").read_text())
        assert {name: facts["choices"][name]["value"] for name in ("threads", "attention")} == {
            name: other[name] for name in ("threads", "attention")
        }
        assert facts["versions"]["torch"] == other["torch"]
        assert {line.partition(", unless")[0] for line in facts["changed"]} == {f"behind step 6: {one}" for one in said}
    ours, theirs = (read_metrics(run_folder(out) / "metrics.jsonl") for out in (again, whole))
    # in float32 1e-4 would do: where the CPU has bfloat16, rounding is 2⁻⁹ of each product
    assert [line.loss for line in ours[1:]] == pytest.approx([line.loss for line in theirs[1:]], rel=1e-2)


def test_what_a_killed_run_left_is_swept(settings, again):
    cut_back(again, 6)
    rooms = [folder / f".edgelora-{name}-abcd1234" for folder, name in (
        (run_folder(again) / "checkpoints", "step-00000007"), (run_folder(again), "run.json"), (again.parent, "mine"),
    )]  # fmt: skip
    other = again.parent / ".edgelora-other-abcd1234"  # another run may be writing it at this moment
    for room in (*rooms, other):
        room.mkdir()
        (room / "half").touch()
    run_training(settings(again, resume=True))
    assert [room for room in rooms if room.exists()] == []
    assert other.exists()


def test_a_run_that_never_was_finite_stops_again(settings, whole, tmp_path, monkeypatch):
    out, heard = tmp_path / "mine", []
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.nan))
        for _ in range(2):
            with pytest.raises(EdgeloraError, match=r"not finite in [34] steps in a row"):
                run_training(settings(out, resume=True), lambda p: heard.append(p.step))
    assert len(heard) - 1 <= 2 * loop.MAX_BAD_STEPS  # and the base before the first step
    found = read_checkpoint(newest(out))
    first = read_checkpoint(checkpoint_path(run_folder(whole) / "checkpoints", 1))
    assert found.facts["state"]["skipped"] == found.step
    assert found.tensors.keys() < first.tensors.keys()  # no optimizer state: no step was taken


def test_a_run_that_ended_gives_the_best_adapter_where_it_is_asked_for(settings, tmp_path):
    """By the very command that its end tells, and the last one again; nothing is computed for that."""
    changes = {**WORSE, "eval_every": 1}
    config = settings(tmp_path / "mine", **changes)
    ended, lines = run_training(config), read_metrics(run_folder(config.out) / "metrics.jsonl")
    before, *steps = (line.held_out_loss for line in lines)
    best = 1 + steps.index(min(steps))
    assert (ended.base_loss, ended.best) == (before, (best, min(steps)))
    assert (ended.step, ended.held_out_loss) == (4, steps[-1])
    assert best < 4, steps
    told, _, command = better_before(ended, config).partition("; ")
    earlier = [f"{before:.4f} before the first step"] * (before < steps[-1]) + [f"{min(steps):.4f} behind step {best}"]
    assert told == f"held-out loss was {' and '.join(earlier)}, it is {steps[-1]:.4f} with this adapter"
    last, (words, _, meant) = outcome(config.out), command.partition(" writes ")
    assert meant == f"the adapter of step {best}"
    assert cli.run(shlex.split(words)[1:]) == 0
    run_training(settings(tmp_path / "other", keep_adapter="best", **changes))
    assert outcome(config.out) == outcome(tmp_path / "other") != last
    again = run_training(settings(config.out, resume=True, keep_adapter="last", **changes))
    assert (again.step, again.best, again.base_loss) == (4, ended.best, before)
    assert outcome(config.out) == last


def test_a_damaged_best_checkpoint_is_named_and_the_last_step_is_written(settings, tmp_path):
    changes = {**WORSE, "eval_every": 1}
    config = settings(tmp_path / "mine", **changes)
    ended, last = run_training(config), outcome(config.out)
    assert ended.best.step < ended.step
    alter_checkpoint(config.out, ended.best.step)
    notes: list[str] = []
    again = run_training(settings(config.out, resume=True, keep_adapter="best", **changes), on_note=notes.append)
    assert notes[-1] == (
        f"step-{ended.best.step:08}: this checkpoint is damaged (state.safetensors was altered): "
        "the adapter of the last step is written instead of the best one"
    )
    assert (again.step, again.held_out_loss) == (ended.step, ended.held_out_loss)
    assert outcome(config.out) == last


def test_nothing_is_said_of_a_run_that_got_better(settings, again):
    ended = run_training(settings(again, resume=True))
    assert ended.best.step == STEPS
    assert better_before(ended, settings(again)) == ""


# -- what may not change ------------------------------------------------------------------------------------------


def test_another_configuration_is_refused_with_every_difference(settings, again):
    cut_back(again, 6)
    before = tree(again.parent)
    with pytest.raises(ConfigError) as caught:
        run_training(settings(again, resume=True, rank=8, learning_rate=1e-3, seed=1))
    for words in ("rank", "4", "8", "learning_rate", "0.005", "0.001", "seed"):
        assert words in caught.value.what
    assert caught.value.why
    assert caught.value.fix
    assert unlocked(tree(again.parent)) == unlocked(before)


@pytest.mark.parametrize(("name", "told"), [("data", "the rows changed"), ("valid", "the held-out rows changed")])
def test_other_rows_are_refused(settings, data, again, tmp_path, name, told):
    cut_back(again, 6)
    lines = data[name == "valid"].read_bytes().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_bytes(b"".join(reversed(lines)))
    with pytest.raises(ConfigError, match=told):
        run_training(settings(again, resume=True, **{name: tmp_path / "rows.jsonl"}))


def test_another_share_of_the_rows_is_refused(settings, data, again):
    """As when `:0.5` is forgotten, or added."""
    cut_back(again, 6)
    with pytest.raises(ConfigError) as caught:
        run_training(settings(again, resume=True, data=f"{data[0]}:0.5"))
    assert caught.value.what.endswith(f"data is {data[0]}:0.5, was {data[0]}")


def test_what_was_chosen_may_be_said_and_what_it_was_is_told(settings, tmp_path):
    config = settings(tmp_path / "mine", max_steps=2, learning_rate=None)
    first = run_training(config)
    chosen = json.loads((run_folder(config.out) / "run.json").read_text())["settled"]["learning_rate"]
    again = run_training(settings(config.out, max_steps=2, learning_rate=chosen, resume=True))
    assert again.losses == first.losses
    with pytest.raises(ConfigError, match=f"learning_rate is 0.5, was {chosen}"):
        run_training(settings(config.out, max_steps=2, learning_rate=0.5, resume=True))


def test_a_chat_template_may_move_and_not_change(settings, make_tiny, tmp_path):
    """It is said by its path, as rows are."""
    base = make_tiny(Type.Q8_0, template=None).path
    first, second = (tmp_path / f"{name}.jinja" for name in ("first", "second"))
    first.write_text(TEMPLATE)
    config = settings(tmp_path / "mine", base=base, chat_template=str(first), max_steps=4)
    whole = run_training(config)
    cut_back(config.out, 2)
    first.rename(second)
    changes = {"base": base, "chat_template": str(second), "max_steps": 4, "resume": True}
    assert run_training(settings(config.out, **changes)).losses == whole.losses
    second.write_text(TEMPLATE.replace("<|im_end|>", " <|im_end|>"))
    with pytest.raises(ConfigError, match="the chat template changed"):
        run_training(settings(config.out, **changes))


def test_a_run_goes_on_where_its_device_is(settings, again):
    """And not where torch has no such card, which it would be told of in the middle of the model."""
    cut_back(again, 6)
    state = checkpoint_path(run_folder(again) / "checkpoints", 6)
    facts = json.loads((state / "state.json").read_text())
    facts["facts"]["settled"]["device"] = "cuda"
    (state / "state.json").write_text(json.dumps(facts))
    (state / MANIFEST).unlink()
    write_manifest(state)
    with pytest.raises(ConfigError, match="--device cuda: there is none"):
        run_training(settings(again, resume=True))


@pytest.mark.parametrize("options", [{"seed": 1}, {"kind": Type.Q4_0}], ids=["weights", "quantization"])
def test_another_base_is_refused(settings, make_tiny, again, options):
    cut_back(again, 6)
    other = make_tiny(options.get("kind", Type.Q8_0), seed=options.get("seed", 0)).path
    with pytest.raises(EdgeloraError, match="base"):
        run_training(settings(again, resume=True, base=other))


def test_what_changes_no_number_may_change(settings, data, whole, again, tmp_path):
    """How often is saved, how much is kept, and where the very same files lie."""
    cut_back(again, 6)
    moved = Path(shutil.copy(data[0], tmp_path / "moved.jsonl"))
    run_training(settings(again, resume=True, save_every=5, keep_checkpoints=1, data=moved))
    assert outcome(again) == outcome(whole)
    assert len(list((run_folder(again) / "checkpoints").iterdir())) <= 2  # the last and the best


def test_without_resume_a_run_that_was_begun_is_not_trodden_on(settings, again):
    cut_back(again, 6)
    before = tree(again.parent)
    with pytest.raises(OutputError) as caught:
        run_training(settings(again))
    assert "--resume" in caught.value.fix
    assert unlocked(tree(again.parent)) == unlocked(before)


def test_who_listens_may_stop_a_run(settings, whole, tmp_path):
    out = tmp_path / "mine"
    with pytest.raises(AskedToStop, match="stopped behind step 3 of 12; nothing is lost") as caught:
        run_training(settings(out), stop_when=lambda progress: progress.step == 3)
    assert caught.value.why == "who listens to it wanted no more"
    words = shlex.split(caught.value.fix.partition("go on with: ")[2])
    assert cli.run(words[1:]) == 0  # the very command that is told
    assert outcome(out) == outcome(whole)


def test_a_pipe_that_closes_ends_a_run_behind_a_saved_step(settings, whole, tmp_path):
    """As `| head` does, though no checkpoint was due."""
    out = tmp_path / "mine"

    def closed(progress: Any) -> None:
        if progress.stage == "train" and progress.step == 3:
            raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        run_training(settings(out, save_every=1000), closed)
    assert newest(out).name == "step-00000003"
    run_training(settings(out, resume=True))
    assert outcome(out) == outcome(whole)


def test_steps_of_the_run_that_is_to_be_replaced_are_not_told_as_saved(settings, again):
    """Stopped while rows are read, before the first one is touched."""
    other = at_once(settings(again, overwrite=True, rank=8))
    assert other.what == "stopped at once, before the first step: what stands there is untouched"
    assert other.fix == "give the same command again"
    assert "until step 12 is saved" in at_once(settings(again, resume=True)).what
    assert "until step 12 is saved" in at_once(settings(again)).what


def test_overwrite_begins_again(settings, whole, again):
    cut_back(again, 6)
    run_training(settings(again, overwrite=True))
    assert outcome(again) == outcome(whole)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optimizer": "adamw8bit"}, "adamw8bit"), ({"samples": ["word " * 5000]}, "sample"),
        ({"tensorboard": True}, "tensorboard is not installed"), ({}, "the checkpoints need"),
    ],
    ids=["optimizer", "samples", "package", "disk"],
)  # fmt: skip
def test_what_is_refused_overwrites_nothing(settings, again, monkeypatch, changes, told):
    cut_back(again, 6)
    before = tree(again.parent)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    if not changes:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(EdgeloraError, match=told):
        run_training(settings(again, overwrite=True, **changes))
    assert unlocked(tree(again.parent)) == unlocked(before)


def test_two_runs_in_one_folder(settings, tmp_path):
    out = tmp_path / "mine"
    with locked(run_folder(out) / "lock"), pytest.raises(OutputError, match=f"process {os.getpid()}"):
        run_training(settings(out))
    assert not out.exists()


def test_a_checkpoint_is_read_by_who_holds_the_folder(settings, whole, again, monkeypatch):
    """Else a run that ends meanwhile could remove what is being read, or go on behind it."""
    cut_back(again, 6)
    with monkeypatch.context() as patch:
        patch.setattr(ready, "earlier_run", lambda *_: pytest.fail("read what another run is writing"))
        with locked(run_folder(again) / "lock"), pytest.raises(OutputError, match="a run is at work here"):
            run_training(settings(again, resume=True))
    real = ready.earlier_run

    def read(*arguments: Any) -> Any:
        with pytest.raises(OutputError), locked(run_folder(again) / "lock"):
            pass
        return real(*arguments)

    monkeypatch.setattr(ready, "earlier_run", read)
    run_training(settings(again, resume=True))
    assert outcome(again) == outcome(whole)


@pytest.mark.parametrize("changes", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_a_run_that_began_while_this_one_read_its_rows_is_left_alone(settings, tmp_path, monkeypatch, changes):
    out = tmp_path / "mine"
    begun, load = checkpoint_path(run_folder(out) / "checkpoints", 1), ready.load_rows

    def slowly(*arguments: Any) -> Any:
        begun.mkdir(parents=True)
        return load(*arguments)

    monkeypatch.setattr(ready, "load_rows", slowly)
    with pytest.raises(OutputError, match="another run was begun here while this one read its rows"):
        run_training(settings(out, **changes))
    assert begun.exists()


def test_a_disk_too_small_is_refused_before_the_first_step(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    heard: list[Any] = []
    with pytest.raises(OutputError, match=r"need [\d,]+ bytes, and 1,000 are free"):
        run_training(settings(tmp_path / "mine"), heard.append)
    assert heard == []


def test_checkpoints_that_will_never_be_written_need_no_disk(settings, tmp_path, monkeypatch):
    """A thousand may be kept, of a run of two steps: two, the best, and the one being written are looked for."""
    asked: list[int] = []
    monkeypatch.setattr(run, "require_space", lambda _folder, needed_bytes, _what: asked.append(needed_bytes))
    for kept in (1, 2, 1000):
        run_training(settings(tmp_path / str(kept), keep_checkpoints=kept, max_steps=2))
    assert asked[1] == asked[2] == asked[0] // 3 * 4


def test_a_disk_that_a_run_could_begin_on_is_large_enough_to_go_on(settings, tmp_path, monkeypatch):
    """What it keeps stands there by then, and is replaced: not a byte more is asked for."""
    out, changes = tmp_path / "mine", {"max_steps": 6, "keep_checkpoints": 2}
    asked: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(run, "require_space", lambda _folder, needed_bytes, _what: asked.append(needed_bytes))
        with pytest.raises(Stopped):
            run_training(settings(tmp_path / "asks", **changes), stop_after(1))
    (size,) = asked

    def usage(_: Path) -> Any:
        used = sum(len(raw) for name, raw in tree(tmp_path).items() if name.startswith("mine.run/checkpoints/"))
        return shutil._ntuple_diskusage(size, used, size - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    for step in (1, 4):  # the second time with all that may be kept
        with pytest.raises(Stopped):
            run_training(settings(out, resume=True, **changes), stop_after(step))
    run_training(settings(out, resume=True, **changes))
    shutil.rmtree(out)
    size -= 1
    with pytest.raises(OutputError, match="the checkpoints need"):
        run_training(settings(out, resume=True, **changes))


def test_a_disk_that_refuses_at_any_call_costs_no_more_than_the_last_checkpoint(settings, tmp_path):
    """Every fifth of the writes, syncs and renames of a run fails in turn: a typed error, and the run goes on."""
    changes = {"max_steps": 3, "save_every": 1, "keep_checkpoints": 2}
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        run_training(settings(tmp_path / "whole", **changes))
    wanted, failed = outcome(tmp_path / "whole"), 0
    for at in range(1, disk.calls + 1, 5):
        out = tmp_path / str(at)
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, fail_at=at)
            try:
                run_training(settings(out, **changes))
            except OutputError:
                failed += 1
        for path in (run_folder(out) / "checkpoints").glob("step-*"):
            read_checkpoint(path)  # raises unless it is whole
        run_training(settings(out, resume=True, **changes))
        assert outcome(out) == wanted, f"call {at}"
    assert failed > 4


def unlocked(files: dict[str, bytes]) -> dict[str, bytes]:
    """Without the lock file, which says who came last."""
    return {name: raw for name, raw in files.items() if not name.endswith("/lock")}


# -- signals, on a child ------------------------------------------------------------------------------------------


@pytest.fixture
def child(settings, at_first_step, tmp_path) -> Callable[..., tuple[subprocess.Popen[str], Path]]:
    """`child(**options)`: a run of the command, given back when its first step is done, and its `--out`."""

    def start(**options: Any) -> tuple[subprocess.Popen[str], Path]:
        out = tmp_path / "mine"
        config = settings(out)
        words = {
            "out": out, "valid": config.valid, "rank": 4, "learning-rate": 5e-3, "batch-rows": 4, "epochs": 500,
            "micro-batch-tokens": 64, "eval-every": 1000, "save-every": 1000, **options,
        }  # fmt: skip
        flags = [str(word) for name, value in words.items() for word in (f"--{name}", value)]
        command = [sys.executable, "-m", "edgelora", "train", str(config.base), str(config.data[0].path), *flags]
        return at_first_step(command, run_folder(out) / "metrics.jsonl"), out

    return start


def newest(out: Path) -> Path:
    return max((run_folder(out) / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_lets_the_step_finish_saves_and_says_how_to_go_on(child, number, code):
    process, out = child()
    process.send_signal(number)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == code, talk
    assert talk.splitlines().count(f"note: {STOPPING}") == 1
    assert not out.exists()
    steps = [line.step for line in read_metrics(run_folder(out) / "metrics.jsonl")]
    found = read_checkpoint(newest(out))
    assert (found.step, found.micro) == (steps[-1], 0)
    command = next(line for line in talk.splitlines() if "--resume" in line)
    words = shlex.split(command[command.index("edgelora") :])
    assert words[:2] == ["edgelora", "train"]
    done = subprocess.run(
        [sys.executable, "-m", *words, "--print-config"], cwd=ROOT, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr  # the command as it is printed can be given


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_stops_in_the_middle_of_a_step(child, number, code):
    """A step of about a hundred micro-batches is lost, the checkpoint before it is not."""
    process, out = child(**{"batch-rows": 96, "micro-batch-tokens": 16, "save-every": 1})
    while not any((run_folder(out) / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    for _ in range(2):
        time.sleep(0.05)
        process.send_signal(number)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == code, talk
    assert "Traceback" not in talk
    assert f"note: {STOPPING}" in talk.splitlines()  # and the step never ended
    what, why, fix = talk.splitlines()[-3:]
    assert what == "stopped at once; what was learned until step 1 is saved, what came behind it is not"
    assert why == ("  why: Ctrl-C" if number == signal.SIGINT else "  why: the signal SIGTERM")
    assert fix.startswith("  fix: go on with: ")
    assert fix.endswith(f"--out {out} --resume")
    assert [line.step for line in read_metrics(run_folder(out) / "metrics.jsonl")][-1] == 1
    assert [read_checkpoint(path).step for path in (run_folder(out) / "checkpoints").iterdir()] == [1]
    assert not out.exists()


# -- death at random moments --------------------------------------------------------------------------------------


class ForkedJob(kill.Job):
    """Its children begin to train within 0.3 s: benchmarks/kill.py starts each as a user does."""

    def start(self, out: Path, log: Path) -> Any:
        return Forked(self.words(out)[3:], log)


def test_thirty_kills_lose_nothing(tiny, tmp_path):
    job = kill.small_job(tiny.path, tmp_path)
    assert job.command[1:3] == ["-m", "edgelora"]
    tally = kill.kill_until(ForkedJob(job.command, job.folder), KILLS, seed=0)
    assert (tally.corrupt, tally.different) == ([], [])
    assert tally.kills == KILLS
    assert tally.in_startup > 0
    assert tally.resumed > 0
    assert tally.finished > 0
