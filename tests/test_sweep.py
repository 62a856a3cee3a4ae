"""A sweep: the halving is Hyperband's, the best trial is the run it would be alone, and it can stop anywhere."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from example_runs import configs, example_rows
from gguf.constants import GGMLQuantizationType as Type
from test_atomic import tree
from test_interrupt import HANG_UP

from edgelora.cli import run
from edgelora.cli.sweep import taken_apart
from edgelora.config import TrainConfig
from edgelora.errors import ConfigError, EdgeloraError, OutputError
from edgelora.files.lock import locked
from edgelora.pipeline.sweep import Sweep, SweepListeners, run_sweep
from edgelora.pipeline.trainee import Trainee
from edgelora.training import curve
from edgelora.training.interrupt import STOPPING
from edgelora.training.metrics import read_metrics
from edgelora.training.run import run_training
from edgelora.training.sweep import Result, Standing, Trial, first_rung, successive_halving, trials_of, work

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


# -- who trains how far -------------------------------------------------------------------------------------------


def halved(losses: dict[str, Callable[[float], float]], faults: tuple[str, ...] = ()) -> tuple[list[str], list[Any]]:
    """The names, the best first, and every (name, share) that was trained, of trials with these losses by share."""
    config = TrainConfig(base="b", data="d", out="o")
    asked = []

    def train(trial: Trial, share: float) -> Result:
        asked.append((trial.name, share))
        points = [(step, losses[trial.name](step / 64)) for step in range(1, int(share * 64) + 1)]
        fault = "diverged" if trial.name in faults else None
        return Result(step=points[-1][0], total=64, held_out=points, seconds=1.0, fault=fault)

    standings = list(successive_halving([Trial(name, {}, config) for name in losses], train))
    return [s.trial.name for s in reversed(standings)], asked


def hyperband_bracket(n: int, eta: int, largest: float) -> list[tuple[int, float]]:
    """(n_i, r_i) of lines 5 to 7 of algorithm 1 (arXiv:1603.06560) for one bracket that ends with one configuration."""
    s = round(math.log(n, eta))
    return [(n // eta**i, largest * eta ** (i - s)) for i in range(s + 1)]


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16])
def test_the_halving_is_hyperbands_inner_loop(n):
    names, asked = halved({f"t{i}": lambda _, i=i: float(i) for i in range(n)})
    counts = [(sum(share == r for _, share in asked), r) for r in sorted({share for _, share in asked})]
    assert counts == hyperband_bracket(n, 2, 1.0)
    assert names == [f"t{i}" for i in range(n)]  # their losses are their numbers: none is out of place
    assert work(n) == sum(
        count * (r - before) for (count, r), before in zip(counts, [0.0, *(r for _, r in counts)], strict=False)
    )


def test_of_an_odd_number_the_larger_half_goes_on():
    names, asked = halved({name: lambda _, i=i: 1.0 + i for i, name in enumerate("abcde")})
    assert [share for _, share in asked] == [1 / 8] * 5 + [1 / 4] * 3 + [1 / 2] * 2 + [1]
    assert first_rung(5) == 1 / 8
    assert work(5) == 5 / 8 + 3 / 8 + 2 / 4 + 1 / 2  # each goes on from where it stopped
    assert names == list("abcde")


def test_a_late_bloomer_is_stopped_and_ranks_by_what_it_reached():
    names, asked = halved({"late": lambda s: 9 - 4 * s, "early": lambda s: 7 - s, "none": lambda _: math.inf})
    assert names == ["early", "late", "none"]
    assert asked == [("late", 1 / 4), ("early", 1 / 4), ("none", 1 / 4), ("early", 1 / 2), ("late", 1 / 2),
                     ("early", 1)]  # fmt: skip


def test_of_equals_the_first_goes_on_and_a_fault_never():
    assert halved(dict.fromkeys("abcd", lambda _: 1.0))[0] == list("abcd")
    names, asked = halved(dict.fromkeys("abcd", lambda _: 1.0), faults=("a", "b", "c"))
    assert names[0] == "d"
    assert asked[4:] == [("d", 1.0)]  # alone, it has no rung left to stop at
    assert len(halved(dict.fromkeys("ab", lambda _: 1.0), faults=("a", "b"))[1]) == 2


def test_a_trial_is_judged_by_the_rung_whatever_was_trained_since():
    """A process that died behind a rung's checkpoint and before its result: the run goes on to the next measurement."""
    result = Result(step=30, total=40, held_out=[(10, 2.0), (20, 1.0), (30, None)], seconds=1.0)
    assert [result.loss_at(share) for share in (1 / 8, 1 / 4, 1 / 2, 3 / 4)] == [2.0, 2.0, 1.0, math.inf]
    assert [result.reached(share) for share in (1 / 2, 3 / 4, 1)] == [True, True, False]
    early = result.model_copy(update={"ended": True, "adapter_loss": 0.9})  # by its patience
    assert (early.loss_at(1 / 2), early.loss_at(1), early.reached(1)) == (1.0, 0.9, True)


# -- which trials there are ---------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return TrainConfig(base="b.gguf", data="d.jsonl", valid="v.jsonl", out=tmp_path / "mine", epochs=3)


def test_every_combination_in_the_order_of_the_words(config):
    trials = trials_of(config, ["rank=4,8", "learning-rate=1e-4,0.0005", "offload=false", "rank=16,4"])
    assert [t.name for t in trials] == [
        f"rank={r},lr={rate},offload=False" for r in (4, 8, 16) for rate in ("0.0001", "0.0005")
    ]
    first = trials[0]
    assert first.settings == {"rank": 4, "learning_rate": 1e-4, "offload": False}
    assert first.config.out == config.out.with_name("mine.sweep") / first.name
    assert (first.config.rank, first.config.learning_rate, first.config.epochs) == (4, 1e-4, 3)


def test_names_of_trials_are_names_of_folders(config):
    names = [t.name for t in trials_of(config, ["device=cuda:0,../x", "ema_decay=0.1234567,0.1234568"])]
    assert names == [f"device={d},ema_decay={e}" for d in ("cuda-0", "..-x") for e in ("0.1234567", "0.1234568")]


SCALARS = [
    "1",
    "64",
    "0.5",
    "true",
    "f32",
    "off",
    "full",
    "4GB",
    "lora",
    "adamw",
    "linear",
    "nf4",
    "none",
    "text",
    "best",
    "MLP",
    "x",
]


@pytest.mark.parametrize("name", TrainConfig.model_fields)
def test_every_setting_is_swept_or_refused_with_its_reason(config, name):
    """One of a few values of every kind fits each setting."""
    outcomes = set()
    for value in SCALARS:
        try:
            outcomes.add(type(getattr(trials_of(config, [f"{name}={value}"])[0].config, name)).__name__)
        except ConfigError as e:
            outcomes.add(e.what.removeprefix(f"--sweep {name}={value}: "))
    refused = {o for o in outcomes if "one for all trials" in o or "could not be compared" in o or "at once" in o}
    assert outcomes == refused or outcomes & {"int", "float", "bool", "str"}, outcomes


@pytest.mark.parametrize(("words", "told"), [
    (["rnak=4"], "rnak=4: there is no such setting, did you mean rank?"),
    (["learning_rat=1"], "did you mean learning_rate?"),
    (["zzz=4"], "zzz=4: there is no such setting"),
    (["rank"], "rank: no values"),
    (["rank=4,,8"], "rank=: it is empty, and must be a whole number"),
    (["rank=4,0"], "rank=0: it is 0, and must be at least 1"),
    (["lr=2", "rank=x"], "learning_rate=2: it is 2, and must be below 1; rank=x: it is x, and must be a whole number"),
    (["method=lora,lroa"], "method=lroa: lroa is none of its values, did you mean lora?"),
    (["objective=sft,dpo"], "held-out losses would be measured differently"),
    (["out=a,b"], "it is one for all trials"),
    (["target_modules=q_proj,v_proj"], "a comma cannot tell them apart"),
])  # fmt: skip
def test_words_that_cannot_be_are_refused_together(config, words, told):
    with pytest.raises(ConfigError) as caught:
        trials_of(config, words)
    assert told in caught.value.what
    assert "--sweep rank=4,8,16 lr=1e-4,5e-4" in caught.value.fix


@pytest.mark.parametrize(("arguments", "rest"), [
    (["base", "rows", "lr=1,2"], ("base", ["rows"])),
    (["base", "lr=1,2", "rows:0.5"], ("base", ["rows:0.5"])),
    (["lr=1,2"], (None, [])),
    ([], (None, [])),
])  # fmt: skip
def test_words_among_the_arguments(arguments, rest):
    base, data = (Path(arguments[0]), arguments[1:]) if arguments else (None, [])
    words, found, rows = taken_apart(["rank=4"], base, data)
    assert words == ["rank=4", *[word for word in arguments if "=" in word]]
    assert (found and str(found), rows) == rest


def test_a_file_is_a_file_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("rank=4", "fold=1.jsonl"):
        Path(name).touch()
    words, base, data = taken_apart(["lr=1"], Path("b"), ["rank=4", "fold=1.jsonl:0.5", "fold=2.jsonl:0.5"])
    assert (words, base, data) == (["lr=1", "fold=2.jsonl:0.5"], Path("b"), ["rank=4", "fold=1.jsonl:0.5"])


# -- a sweep of a tiny model --------------------------------------------------------------------------------------

WORDS = ["rank=2,4", "lr=1e-5,5e-3"]
BEST = "rank=4,lr=0.005"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(16 rows to learn, 4 held out) of the example commands."""
    folder = tmp_path_factory.mktemp("data")
    return example_rows(folder / "train.jsonl", 0, 16), example_rows(folder / "valid.jsonl", 16, 20)


@pytest.fixture(scope="module")
def settings(make_tiny: Callable[..., Any], data: tuple[Path, Path]) -> Callable[..., TrainConfig]:
    """`settings(out, **changes)`: eight steps over the Q8_0 model, measured after every other."""
    return configs(
        base=make_tiny(Type.Q8_0).path, data=data[0], valid=data[1], warmup_steps=2, epochs=2, batch_rows=4,
        micro_batch_tokens=256, eval_every=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def swept(settings: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`--out` of a sweep that nobody stopped; its folder is copied, never changed."""
    out = tmp_path_factory.mktemp("swept") / "mine"
    run_sweep(settings(out), WORDS)
    return out


@pytest.fixture
def again(swept: Path, tmp_path: Path) -> Path:
    shutil.copytree(swept.parent, tmp_path / "again")
    return tmp_path / "again" / swept.name


def record(out: Path) -> dict[str, Any]:
    return json.loads((out.with_name("mine.sweep") / "sweep.json").read_text(encoding="utf-8"))


def outcome(out: Path) -> tuple[Any, ...]:
    """Everything of a sweep that does not tell the time."""
    found = record(out)
    curves = {name: (r["step"], r["held_out"], r["ended"], r["fault"]) for name, r in found["results"].items()}
    ranking = [{k: v for k, v in row.items() if k != "seconds"} for row in found["ranking"]]
    return curves, ranking, [(out / name).read_bytes() for name in ADAPTER]


def decided(out: Path) -> tuple[Any, ...]:
    """The same without how far a loser came: a trial that died behind its rung goes on to the next measurement."""
    ranking = [(row["trial"], row["held_out_loss"], row["fault"]) for row in record(out)["ranking"]]
    return ranking, record(out)["results"][BEST]["held_out"], [(out / name).read_bytes() for name in ADAPTER]


def test_the_best_trial_is_the_run_it_would_be_alone(settings, swept, tmp_path):
    alone = tmp_path / "alone"
    run_training(settings(alone, rank=4, learning_rate=5e-3))
    assert record(swept)["ranking"][0]["trial"] == BEST
    for name in ADAPTER:  # stopped and resumed at two rungs, its schedule is that of the whole run
        assert (swept / name).read_bytes() == (alone / name).read_bytes()
    kept = swept.with_name("mine.sweep") / BEST
    assert tree(swept) == tree(kept)


def test_losers_are_stopped_at_their_rungs(swept):
    rows = {row["trial"]: row for row in record(swept)["ranking"]}
    assert [(row["steps"], row["stopped_at"]) for row in rows.values()] == [(8, None), (4, 0.5), (2, 0.25), (2, 0.25)]
    for name, row in rows.items():
        measured = read_metrics(swept.with_name("mine.sweep") / f"{name}.run" / "metrics.jsonl")
        assert [m.step for m in measured] == list(range(row["steps"] + 1))
        assert measured[-1].held_out_loss == row["held_out_loss"]
    assert [row["held_out_loss"] for row in rows.values()][2] <= [row["held_out_loss"] for row in rows.values()][3]


def test_a_sweep_leaves_its_trials_a_picture_and_no_checkpoints_of_losers(swept):
    folder = swept.with_name("mine.sweep")
    names = {row["trial"] for row in record(swept)["ranking"]}
    runs = {f"{name}.run" for name in names}
    assert {p.name for p in folder.iterdir()} == {"lock", "sweep.json", "sweep.png", BEST, *runs}
    assert [p.parent.name for p in folder.glob("*/checkpoints")] == [f"{BEST}.run"]
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in swept.parent.iterdir()} == {"mine", "mine.sweep"}


def test_resuming_what_has_ended_trains_nothing(settings, swept, again):
    heard: list[Any] = []
    shutil.rmtree(again)
    run_sweep(settings(again, resume=True), WORDS, SweepListeners(heard.append))
    assert heard == []
    assert outcome(again) == outcome(swept)


def test_the_picture_ranks_as_the_sweep_does(settings, again, monkeypatch):
    drawn: list[Any] = []
    monkeypatch.setattr(curve, "sweep_plot", lambda _path, trials, _title, _objective: drawn.extend(trials))
    run_sweep(settings(again, overwrite=True, resume=True), WORDS)
    wanted = [(row["trial"], row["held_out_loss"], row["stopped_at"] is not None) for row in record(again)["ranking"]]
    assert [(trial.name, trial.loss, trial.stopped) for trial in drawn] == wanted


def test_a_trial_whose_loss_is_no_number_loses(settings, tmp_path):
    """The first step makes its weights so large that the next three, in a row, teach nothing."""
    out = tmp_path / "mine"
    said: list[str] = []
    run_sweep(settings(out, rank=2, eval_every=8), ["weight_decay=1e30,0"], SweepListeners(on_say=said.append))
    best, lost = record(out)["ranking"]
    assert (best["trial"], best["fault"], best["stopped_at"]) == ("weight_decay=0", None, None)
    assert (lost["held_out_loss"], lost["steps"]) == (None, 4)
    assert "not finite in 3 steps in a row" in lost["fault"]
    assert any(line.startswith("weight_decay=1e+30: the loss or its gradient was not finite") for line in said)


# -- stopped, and gone on with ------------------------------------------------------------------------------------


class Fault(Exception):
    """What a listener raises, as a fault of the program would."""


@pytest.mark.parametrize("moment", [("rank=2,lr=1e-05", 1), ("rank=4,lr=1e-05", 2), (BEST, 8)])
def test_a_sweep_that_died_anywhere_goes_on(settings, swept, tmp_path, moment):
    out = tmp_path / "mine"

    def die(progress: Any) -> None:
        if (progress.stage, progress.step) == moment:
            raise Fault

    with pytest.raises(Fault):
        run_sweep(settings(out), WORDS, SweepListeners(die))
    assert not out.exists()
    run_sweep(settings(out, resume=True), WORDS)
    assert decided(out) == decided(swept)


@pytest.mark.parametrize(("number", "code", "group"), [(signal.SIGINT, 130, True), (signal.SIGTERM, 143, False)])
def test_a_signal_leaves_what_is_done_and_says_how_to_go_on(settings, at_first_step, tmp_path, number, code, group):
    """Ctrl-C in a terminal reaches every process of its group, a polite kill the parent alone."""
    out = tmp_path / "mine"
    config = settings(out)
    words = [str(config.base), str(config.data[0].path), "--sweep", *WORDS, "--valid", str(config.valid)]
    words += ["--out", str(out), "--batch-rows", "4", "--micro-batch-tokens", "256", "--eval-every", "2"]
    words += ["--epochs", "500", "--warmup-steps", "2"]
    metrics = out.with_name("mine.sweep") / "rank=2,lr=1e-05.run" / "metrics.jsonl"
    process = at_first_step([sys.executable, "-m", "edgelora", "train", *words], metrics, start_new_session=True)
    (os.killpg if group else os.kill)(process.pid, number)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == code, talk
    assert "Traceback" not in talk
    assert talk.splitlines().count(f"note: {STOPPING}") == 1
    assert not out.exists()
    assert len(list((metrics.parent / "checkpoints").iterdir())) >= 1
    command = next(line for line in talk.splitlines() if "--resume" in line)
    words = shlex.split(command[command.index("edgelora") :])
    assert [words[i + 1] for i, word in enumerate(words) if word == "--sweep"] == WORDS
    assert run([*words[1:], "--print-config"]) == 0  # the command as it is printed can be given


def test_the_first_signal_is_answered_and_handed_on_at_once(monkeypatch):
    """Not with the child's next step, which may take a minute; and handed on once, if it had begun."""
    did: list[Any] = []
    monkeypatch.setattr("edgelora.pipeline.trainee.os.kill", lambda *asked: did.append(asked))
    child, loading = Trainee(lambda _: None, did.append, _pid=7), Trainee(lambda _: None, did.append)
    for trainee in (child, child, loading):
        trainee.answer()
    assert did == [(7, signal.SIGINT), STOPPING, STOPPING, STOPPING]


@pytest.mark.parametrize(("stop", "code", "why"), [
    (KeyboardInterrupt(), 130, "Ctrl-C"), (SystemExit(143), 143, "the signal SIGTERM"),
    pytest.param(SystemExit(129), 129, "the signal SIGHUP", marks=HANG_UP),
])  # fmt: skip
def test_a_second_signal_says_what_stands(settings, again, tmp_path, monkeypatch, capsys, stop, code, why):
    def stopped(*_):
        raise stop

    monkeypatch.setattr("edgelora.pipeline.sweep.successive_halving", stopped)
    for out, more in ((again, ["--resume"]), (tmp_path / "none", [])):
        config = settings(out)
        line = ["train", str(config.base), str(config.data[0].path), "--sweep", *WORDS, "--out", str(out), *more]
        if not more:
            monkeypatch.setattr("edgelora.pipeline.sweep.trials_of", stopped)  # before anything is written
        assert run([*line, "--valid", str(config.valid)]) == code
        what, told, fix = capsys.readouterr().err.splitlines()[-3:]
        assert told == f"  why: {why}"
        if more:
            assert what == f"stopped at once; what the trials had saved by then is in {out}.sweep"
            assert fix.startswith("  fix: go on with: ")
            assert fix.endswith("--sweep rank=2,4 --sweep lr=1e-5,5e-3 --resume")
        else:
            assert (what, fix) == ("stopped at once: nothing was saved", "  fix: give the same command again")


def test_what_may_not_change_when_a_sweep_goes_on(settings, again):
    before = tree(again.parent)
    with pytest.raises(ConfigError, match=r"epochs is 3\.0, was 2\.0; batch_rows is 2, was 4"):
        run_sweep(settings(again, resume=True, epochs=3, batch_rows=2), WORDS)
    with pytest.raises(ConfigError, match="its trials were"):
        run_sweep(settings(again, resume=True), ["rank=2,4"])
    assert tree(again.parent) == before


def test_other_rows_are_refused_by_a_trial_that_has_not_begun(settings, again, data, tmp_path):
    found = record(again)
    del found["results"][BEST]
    folder = again.with_name("mine.sweep")
    (folder / "sweep.json").write_text(json.dumps(found), encoding="utf-8")
    for name in (BEST, f"{BEST}.run"):
        shutil.rmtree(folder / name)
    rows = data[1].read_bytes().splitlines(keepends=True)
    (tmp_path / "valid.jsonl").write_bytes(b"".join(reversed(rows)))
    with pytest.raises(ConfigError, match="this is not the sweep that was begun: the held-out rows changed"):
        run_sweep(settings(again, resume=True, valid=tmp_path / "valid.jsonl"), WORDS)


# -- refused ------------------------------------------------------------------------------------------------------


def test_without_held_out_rows_there_is_nothing_to_rank_by(settings, tmp_path):
    with pytest.raises(ConfigError, match="--sweep without --valid"):
        run_sweep(settings(tmp_path / "mine", valid=None), WORDS)


def test_several_processes_are_refused(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun"):
        run_sweep(settings(tmp_path / "mine"), WORDS)


def test_a_sweep_that_stands_is_not_trodden_on(settings, again):
    shutil.rmtree(again)
    with pytest.raises(OutputError, match="a sweep was begun here") as caught:
        run_sweep(settings(again), WORDS)
    assert "--resume" in caught.value.fix
    folder = again.with_name("mine.sweep")
    with locked(folder / "lock"), pytest.raises(OutputError, match="a run is at work here"):
        run_sweep(settings(again, resume=True), WORDS)
    (folder / "sweep.json").unlink()
    with pytest.raises(OutputError, match="this folder is no sweep's"):
        run_sweep(settings(again, overwrite=True), WORDS)


def test_overwrite_begins_again_and_the_same_sweep_comes_out(settings, swept, again):
    (again.with_name("mine.sweep") / "stray").touch()
    run_sweep(settings(again, overwrite=True), WORDS)
    assert outcome(again) == outcome(swept)
    assert not (again.with_name("mine.sweep") / "stray").exists()


def test_a_fault_of_the_data_ends_the_sweep(settings, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{\n", encoding="utf-8")
    with pytest.raises(EdgeloraError, match=r"rows\.jsonl: 1 broken line"):
        run_sweep(settings(tmp_path / "mine", data=tmp_path / "rows.jsonl"), WORDS)


@pytest.mark.parametrize(("method", "words", "told"), [
    ("bitfit", ["rank=4,8"], "2 of 2 trials cannot be trained, such as rank=4: --method bitfit --rank 4: it has "),
    ("lora", ["rank=4,8", "method=lora,layernorm"], "2 of 4 trials cannot be trained, such as rank=4,method=layernorm"),
    ("lora", ["rank=4,1024"], "1 of 2 trials cannot be trained, such as rank=1024: rank 1024: model.layers.0."),
    ("lora", ["method=lora,full"], "1 of 2 trials cannot be trained, such as method=full: --method full: "),
    ("lora", ["method=lora,token_rows"], "1 of 2 trials cannot be trained, such as method=token_rows: train_tokens: "),
    ("lora", ["group_size=8,16"], "2 of 2 trials cannot be trained, such as group_size=8: group_size: nothing that "),
])  # fmt: skip
def test_what_a_trials_method_cannot_take_is_refused_before_any_is_trained(settings, tmp_path, method, words, told):
    with pytest.raises(ConfigError) as caught:
        run_sweep(settings(tmp_path / "mine", method=method), words)
    assert caught.value.what.startswith(told)
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_and_its_halving_never_import_torch():
    code = "import sys, edgelora.pipeline.sweep, edgelora.cli.sweep; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0  # the memory of a trial is all in its child


# -- the command --------------------------------------------------------------------------------------------------


def test_the_command_prints_the_ranking(settings, again, capsys):
    config = settings(again)
    line = ["train", str(config.base), str(config.data[0].path), *WORDS[1:], "--sweep", WORDS[0], "--out", str(again)]
    line += ["--valid", str(config.valid), "--resume"]
    wanted = trials_of(config, [WORDS[0], WORDS[1]])
    assert {t.name for t in wanted} == {row["trial"] for row in record(again)["ranking"]}
    assert run(line) == 0
    shown = capsys.readouterr()
    for row in record(again)["ranking"]:
        assert f"{row['trial']} " in shown.out
        assert f"{row['steps']}/8" in shown.out
        assert f"{row['held_out_loss']:.4f}" in shown.out
    assert f"the adapter of {BEST}" in shown.err
    assert run([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ranking"] == record(again)["ranking"]


@pytest.mark.parametrize(("method", "following"), [("lora", "export"), ("dora", "export"), ("glora", "merge")])
def test_what_to_type_next_fits_the_best_trials_method(settings, tmp_path, monkeypatch, capsys, method, following):
    config = settings(tmp_path / "mine")

    def swept(asked, words, _):
        trials = {trial.settings["method"]: trial for trial in trials_of(asked, words)}
        result = Result(step=8, total=8, held_out=((8, 1.0),), seconds=1.0, ended=True, adapter_loss=1.0)
        return Sweep(asked.out, tmp_path, [Standing(trials[method], result, 1.0)])

    monkeypatch.setattr("edgelora.pipeline.sweep.run_sweep", swept)
    line = ["train", str(config.base), str(config.data[0].path), "--sweep", "method=lora,dora,glora", "--out", "mine"]
    assert run([*line, "--valid", str(config.valid)]) == 0
    assert f" {following} " in capsys.readouterr().err.splitlines()[-1]


def test_a_misspelt_word_is_three_lines(settings, tmp_path, capsys):
    config = settings(tmp_path / "mine")
    line = ["train", str(config.base), str(config.data[0].path), "rnak=4,8", "--sweep", "lr=1e-4", "--out", "x"]
    assert run([*line, "--valid", str(config.valid)]) == 1
    assert capsys.readouterr().err.splitlines()[0] == (
        "error: --sweep rnak=4,8: there is no such setting, did you mean rank?"
    )
