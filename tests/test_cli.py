"""The command line: help with an example, and three lines for whatever a user gets wrong."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import typer
from conftest import ROOT

from edgelora.base.model import open_base
from edgelora.cli import app, run
from edgelora.cli.arguments import named, scaled
from edgelora.errors import AdapterError, ConfigError, DataError
from edgelora.files.contract import Contract
from edgelora.peft.adapter import Adapter, write_adapter

GROUPS = {"adapters": ["add", "list", "remove", "show"], "data": ["check"]}
COMMANDS = sorted(typer.main.get_command(app).commands)
HELPED = [[name, *more] for name in COMMANDS for more in ([[one] for one in GROUPS[name]] if name in GROUPS else [[]])]
ROW = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'
MODULE = "model.layers.0.self_attn.q_proj"


def write_lora(folder: Path, base_path: Path) -> Path:
    """An adapter of rank 2 on one layer, with the contract of its base."""
    base = open_base(base_path)
    contract = Contract(
        version="0", base=base.fingerprint, base_file=base.base_file, tokenizer_sha256=base.tokenizer.sha256,
        chat_template_sha256=base.template_sha256, eog_ids=base.tokenizer.eog_ids, method="lora",
    )  # fmt: skip
    d_out, d_in = base.linears[MODULE]
    tensors = {MODULE: {"lora_A": np.ones((2, d_in), np.float32), "lora_B": np.ones((d_out, 2), np.float32)}}
    write_adapter(folder, Adapter({"peft_type": "LORA", "r": 2, "lora_alpha": 2.0}, tensors, contract))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny, make_tiny) -> SimpleNamespace:
    """Good and bad inputs by name."""
    room = tmp_path_factory.mktemp("inputs")
    at = SimpleNamespace(room=room, base=tiny.path, missing=room / "missing", here=room / "here")
    at.nothing = room / "nothing"
    at.nothing.mkdir()
    at.here.write_bytes(b"mine")
    at.rows, at.broken, at.empty, at.mute = (room / f"{n}.jsonl" for n in ("rows", "broken", "empty", "mute"))
    at.rows.write_text("".join(ROW.replace("Hi", f"Hi {i}") for i in range(4)), encoding="utf-8")
    at.broken.write_text(ROW + "{\n" + ROW + "[]\n", encoding="utf-8")
    at.empty.write_text("\n", encoding="utf-8")
    at.mute.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n', encoding="utf-8")
    at.blank = room / "blank.jsonl"  # rows with an answer that is read and not learned
    at.blank.write_text(ROW.replace('"Hello"', '"Hello", "weight": 0') * 2, encoding="utf-8")
    at.misspelt, at.torn, at.wrong, at.settings = (
        room / f"{n}.toml" for n in ("misspelt", "torn", "wrong", "settings")
    )
    at.settings.write_text(f"base = '{at.base}'\ndata = '{at.rows}'\n", encoding="utf-8")
    at.misspelt.write_text("learning_rat = 1e-3\nzzz = 1\n", encoding="utf-8")
    at.torn.write_text("rank = \n", encoding="utf-8")
    at.wrong.write_text(f"{at.settings.read_text()}rank = 'many'\n", encoding="utf-8")
    at.stranger = room / "stranger.gguf"
    writer = gguf.GGUFWriter(at.stranger, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    at.text = room / "text.gguf"
    at.text.write_text("not a model " * 10, encoding="utf-8")
    at.adapter = write_lora(room / "adapter", tiny.path)
    at.other = write_lora(room / "other", make_tiny(seed=1).path)
    at.unsigned = Path(shutil.copytree(at.adapter, room / "unsigned"))
    (at.unsigned / "edgelora.json").unlink()
    at.pickled = Path(shutil.copytree(at.adapter, room / "pickled"))
    (at.pickled / "adapter_model.safetensors").rename(at.pickled / "adapter_model.bin")
    at.untaught = make_tiny(template=None).path
    return at


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def called(files: SimpleNamespace, folder: Path, line: str) -> list[str]:
    """`train {base} {rows} --out {out}` with the paths of `files` in it, and an `out` of its own."""
    return [word.format(**vars(files), out=folder / "out") for word in line.split()]


# -- help ---------------------------------------------------------------------------------------------------------


def test_help_names_every_command(capsys):
    assert run(["--help"]) == 0
    shown = capsys.readouterr()
    assert [name for name in COMMANDS if f" {name} " not in shown.out] == []
    assert shown.err == ""


@pytest.mark.parametrize("words", HELPED, ids=" ".join)
def test_every_command_has_an_example(capsys, words):
    assert run([*words, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Example:" in shown
    assert f"edgelora {' '.join(words)}" in shown.split("Example:")[1]


def test_every_group_is_known():
    found = {
        name: sorted(c.commands) for name, c in typer.main.get_command(app).commands.items() if hasattr(c, "commands")
    }
    assert found == GROUPS


def test_no_command_at_all_is_help(capsys):
    assert run([]) == 2
    assert "Usage" in "".join(capsys.readouterr())


# -- three lines --------------------------------------------------------------------------------------------------

# a command line → what the first line says of it
REFUSED = {
    "train {missing} {rows} --out {out}": "no such file",
    "train {nothing} {rows} --out {out}": "no models in this folder",
    "train {text} {rows} --out {out}": "not a usable GGUF file",
    "train {stranger} {rows} --out {out}": "a model of the architecture mamba",
    "train {base} {broken} --out {out}": "broken.jsonl: 2 broken lines",
    "train {base} {empty} --out {out}": "empty.jsonl: no rows in it",
    "train {base} {mute} --out {out}": "mute.jsonl: 1 broken line",
    "train {base} {missing} --out {out}": "cannot be read",
    "train {base} {nothing} --out {out}": "cannot be read",
    "train {base} {rows} --out {out} --valid {broken}": "broken.jsonl: 2 broken lines",
    "train {base} {rows} --out {here}": "this file exists already",
    "train {base} {rows} --out {nothing}": "this folder exists already",
    "train {base} {rows} --out {out} --learning-rate -1": "--learning-rate: it is -1.0, and must be above 0",
    "train {base} {rows} --out {out} --rank 0 --epochs -1": "--rank: it is 0, and must be at least 1; --ep",
    "train {base} {rows} --out {out} --learning-rate nan": "--learning-rate",
    "train {base} {rows} --out {out} --alpha inf": "--alpha",
    "train {base} {rows} --out {out} --epochs inf": "--epochs",
    "train {base} {rows} --out {out} --max-length 8": "4 rows are longer than 8 tokens",
    "train {base} {rows}:0 --out {out}": "DATA: the weight of ",
    "train {base} {rows} --out {out} --max-gpu-memory 8": "--max-gpu-memory: ",
    "train {base} {rows} --out {out} --patience 1": "--patience 1 without --valid",
    "train {base} {rows} --out {out} --target-modules q_porj": "no linear layer of this model is named q_porj",
    "train {base} {rows} --out {out} --data-format csv": "the data format csv",
    "train {base} {rows} --out {out} --device tpu": "--device tpu: there is none that torch can use",
    "train {base} {rows} --out {out} --objective dpo": "rows.jsonl:1: a row of the format ",
    "train {base} {blank} --out {out}": "no row has a token to learn: all labels are masked",
    "train --config {misspelt} --out {out}": "unknown settings: learning_rat (did you mean learning_rate?), zzz",
    "train --config {torn} --out {out}": "no TOML file that can be read",
    "train --config {missing} --out {out}": "no TOML file that can be read",
    "train --config {wrong} --out {out}": "wrong.toml: rank: it is many, and must be a whole number",
    "data check {broken} --base {base}": "broken.jsonl: 2 broken lines",
    "export {missing} {adapter} --out {out}": "no such file",
    "export {base} {missing} --out {out}": "no adapter here",
    "export {base} {nothing} --out {out}": "no adapter here",
    "export {base} {rows} --out {out}": "no adapter here",
    "export {base} {other} --out {out}": "does not belong to",
    "export {base} {unsigned} --out {out}": "it does not say which base it belongs to",
    "export {base} {adapter} --out {here}": "this file exists already",
    "export {base} {adapter} --out {out} --type Q4_0": "--type Q4_0",
    "export {base} {adapter} --out {out} --data {broken}": "broken.jsonl: 2 broken lines",
    "merge {missing} --adapter {adapter} --out {out}": "no such file",
    "merge {base} --adapter {missing}:0.5 --out {out}": "no adapter here",
    "merge {base} --adapter {other} --out {out}": "does not belong to",
    "merge {base} --adapter {adapter} --to Q9_K --out {out}": "Q9_K: no such quantization type",
    "merge {base} --adapter {adapter} --out {here}": "this file exists already",
    "quantize {missing} {out} Q4_K_M": "no such file",
    "quantize {stranger} {out} Q4_K_M": "its tokenizer (missing, pre-tokenizer missing) is not known",
    "quantize {base} {out} Q9_K": "Q9_K: no such quantization type",
    "quantize {base} {here} Q4_K_M": "this file exists already",
    "eval {missing} --data {rows}": "no such file",
    "eval {base} --data {broken}": "broken.jsonl: 2 broken lines",
    "eval {base} --data {rows} --adapter {missing}": "no such file",
    "export {base} {pickled} --out {out}": "adapter_model.bin: this is a pickle",
    "train {untaught} {rows} --out {out} --chat-template {missing}": "the chat template cannot be read (No such file",
    "chat {missing}": "no such file",
    "chat {nothing}": "no models in this folder",
    "chat {base} --adapter a/b={missing}": "a/b is no name for an adapter",
    "chat {base} --adapter a={missing}": "cannot be read",
    "chat {base} --adapter a={text}": "not a usable GGUF file",
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_wrong_input_is_three_lines_on_stderr(capsys, files, tmp_path, line):
    before = tree(files.room)
    assert run(called(files, tmp_path, line)) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    what, *more, why, fix = shown.err.splitlines()
    assert what.startswith("error: ")
    assert REFUSED[line] in what
    assert why.startswith("  why: ")
    assert fix.startswith("  fix: ")
    assert all(".jsonl:" in fault for fault in more)  # the broken lines of a file, each on a line of its own
    assert "Traceback" not in shown.err
    assert tree(files.room) == before
    assert list(tmp_path.iterdir()) == []


# a command line → what is said to be wrong with it
MISUSED = {
    "no-such-command": "No such command 'no-such-command'.",
    "train": "Invalid value for 'BASE' / 'DATA' / '--out': missing, and not in a --config file",
    "train {base} {rows}": "Invalid value for '--out': missing, and not in a --config file",
    "train {base} {rows} --out {out} --rank many": "Invalid value for '--rank': Input should be a valid integer",
    "train {base} {rows} --out {out} --no-such-option": "No such option: --no-such-option",
    "train {base} {rows} --out {out} --base-dtype int3": "Invalid value for '--base-dtype': int3 is none of its values",
    "train --config {settings}": "Invalid value for '--out': missing, and not in a --config file",
    "data check {rows}": "Missing option '--base'",
    "merge {base} --out {out}": "Invalid value for ADAPTER: name at least one, behind the base",
    "quantize {base} {out}": "Invalid value for TYPE: name one, such as Q4_K_M",
    "eval {base}": "Missing option '--data'",
    "tokenize": "Missing argument ",
    "chat --no-such-option": "No such option: --",  # and it has no --json
}


@pytest.mark.parametrize("line", MISUSED)
def test_wrong_usage_is_exit_code_2(capsys, files, tmp_path, line):
    assert run(called(files, tmp_path, line)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Usage" in shown.err
    assert "Traceback" not in shown.err


@pytest.mark.parametrize("line", MISUSED)
def test_a_program_is_told_of_wrong_usage_in_one_event(capsys, files, tmp_path, line):
    assert run([*called(files, tmp_path, line), "--json"]) == 2
    shown = capsys.readouterr()
    event = json.loads(shown.err)
    assert (shown.out, list(event), event["event"]) == ("", ["event", "what", "why", "fix"], "error")
    assert event["what"].startswith(MISUSED[line])
    command = " ".join(word for word in line.split()[:2] if word in (*COMMANDS, "check"))
    assert re.fullmatch(rf"Usage: .*{command} .*", event["why"])
    assert re.fullmatch(rf"see `.*{command} --help`", event["fix"].replace("  ", " "))


def test_what_python_warns_of_is_a_note_for_programs(monkeypatch, capsys):
    def described():
        warnings.warn("soon gone", FutureWarning, stacklevel=1)
        return []

    monkeypatch.setattr("edgelora.pipeline.methods.described", described)
    with warnings.catch_warnings(action="always"):
        before = warnings.showwarning
        assert run(["methods", "--json"]) == 0
        assert warnings.showwarning is before
    text = f"FutureWarning: soon gone (test_cli.py, line {described.__code__.co_firstlineno + 1})"
    assert json.loads(capsys.readouterr().err) == {"event": "note", "text": text}


def test_a_program_is_told_that_it_was_stopped_by_what_typer_returns(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("edgelora.pipeline.methods.described", interrupted)
    assert run(["methods", "--json"]) == 130
    assert json.loads(capsys.readouterr().err)["why"] == "Ctrl-C"


@pytest.mark.parametrize("said", ["", "Unable to allocate 9 GiB"])
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_memory_that_runs_out_anywhere_is_an_error_in_words(monkeypatch, capsys, said, options):
    def greedy():
        raise MemoryError(said)

    monkeypatch.setattr("edgelora.pipeline.methods.described", greedy)
    assert run(["methods", *options]) == 1
    told = capsys.readouterr().err
    what = "there was not enough memory" + f" ({said})" * bool(said)
    assert json.loads(told)["what"] == what if options else told.startswith(f"error: {what}\n  why: ")
    assert "Traceback" not in told
    with pytest.raises(MemoryError):
        run(["--debug", "methods"])


@pytest.mark.parametrize(
    "line", ["train {base} {rows} --out {here} --json", "export {missing} {adapter} --json --out {out}"]
)
def test_a_program_is_told_of_an_error_in_one_event(capsys, files, tmp_path, line):
    assert run(called(files, tmp_path, line)) == 1
    asked = capsys.readouterr()
    event = json.loads(asked.err)
    assert (asked.out, list(event)) == ("", ["event", "what", "why", "fix"])
    assert run(called(files, tmp_path, line.replace("--json ", "").replace(" --json", ""))) == 1
    what, why, fix = (event[name] for name in ("what", "why", "fix"))
    assert capsys.readouterr().err == f"error: {what}\n  why: {why}\n  fix: {fix}\n"


@pytest.mark.parametrize("line", [
    "add-tokens {base} --token <tool> --out {out}", "compose {base} --adapter {adapter} --out {out}",
    "eval {base} --data {rows}", "export {base} {adapter} --out {out}", "imatrix {base} --data {rows} --out {out}",
    "import {base} {adapter} --out {out}", "merge {base} {adapter} --out {out}",
    "tokenize {base} --chat {rows} --check", "untie {base} --out {out}",
])  # fmt: skip
def test_a_program_hears_of_the_work_in_events_and_gets_one_result(capsys, files, tmp_path, line):
    assert run([*called(files, tmp_path, line), "--json"]) == 0
    shown = capsys.readouterr()
    assert isinstance(json.loads(shown.out), dict)
    events = {json.loads(line)["event"] for line in shown.err.splitlines()}
    assert events
    assert events <= {"progress", "said", "note"}


def test_no_command_takes_a_person_for_granted():
    """`listener` alone makes the display: whoever reads JSON on stderr must not find prose there."""
    named = [path.name for path in (ROOT / "edgelora" / "cli").glob("*.py") if "Display()" in path.read_text("utf-8")]
    assert named == ["display.py"]


@pytest.mark.parametrize(("words", "as_json"), [(["plan", "b", "--json"], True), (["plan", "--", "--json"], False)])
def test_a_program_is_told_that_a_command_was_stopped(monkeypatch, capsys, words, as_json):
    def stopped(*_, **__):
        raise SystemExit(130)

    monkeypatch.setattr("edgelora.cli.app", stopped)
    assert run(words) == 130
    line = "stopped; what was not finished was not written"
    event = {"event": "error", "what": line, "why": "Ctrl-C", "fix": "give the same command again"}
    assert capsys.readouterr().err == (f"{json.dumps(event)}\n" if as_json else f"\n{line}\n")


def test_debug_raises(files, tmp_path):
    with pytest.raises(DataError):
        run(called(files, tmp_path, "--debug train {base} {broken} --out {out}"))


def test_debug_is_off_again_in_the_next_call(capsys, files, tmp_path):
    with pytest.raises(AdapterError):
        run(called(files, tmp_path, "--debug export {base} {missing} --out {out}"))
    assert run(called(files, tmp_path, "export {base} {missing} --out {out}")) == 1
    assert "Traceback" not in capsys.readouterr().err


# -- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("adapters/mine", ("adapters/mine", 1.0)),
        ("adapters/mine:0.5", ("adapters/mine", 0.5)),
        ("adapters/mine:-1", ("adapters/mine", -1.0)),
        ("adapters/mine:1e-3", ("adapters/mine", 1e-3)),
        ("adapters/mine:", ("adapters/mine:", 1.0)),
        ("a:b", ("a:b", 1.0)),
        ("a:b:2", ("a:b", 2.0)),
        (r"C:\adapters\mine", (r"C:\adapters\mine", 1.0)),
    ],
)
def test_scaled(text, expected):
    assert scaled(text) == (Path(expected[0]), expected[1])


@pytest.mark.parametrize("text", ["mine:nan", "mine:inf", "mine:-inf"])
def test_a_scale_must_be_finite(text):
    with pytest.raises(ConfigError) as caught:
        scaled(text)
    assert text in caught.value.what


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("home=a/home.gguf", ("home", "a/home.gguf")),
        ("a/home.gguf", ("home", "a/home.gguf")),
        ("v1.2_x-y=f", ("v1.2_x-y", "f")),
        ("x=a=b.gguf", ("x", "a=b.gguf")),
        ("größe=f", ("größe", "f")),
        ("a/two words.gguf", ("two-words", "a/two words.gguf")),
    ],
)
def test_named(text, expected):
    assert named(text) == (expected[0], Path(expected[1]))


@pytest.mark.parametrize("text", ["", "=f", "two words=f", "a/b=f", "-=f", "x:1=f"])
def test_a_name_one_can_type_in_chat(text):
    with pytest.raises(ConfigError) as caught:
        named(text)
    assert caught.value.what.startswith(f"--adapter {text}: ")
    assert caught.value.fix == "write --adapter NAME=FILE"


# -- train --------------------------------------------------------------------------------------------------------


def trains(files: SimpleNamespace, out: Path, *more: str) -> list[str]:
    """Words of a short run; of rank 2, unless `more` names a method that has none."""
    rank = [] if "full" in more else ["--rank", "2"]
    return ["train", str(files.base), str(files.rows), "--out", str(out), "--epochs", "0.05", *rank, *more]


def test_ctrl_c_stops_a_training_where_it_can_go_on(tiny, tmp_path):
    rows, out = ROOT / "examples" / "home" / "test.jsonl", tmp_path / "mine"
    command = [sys.executable, "-m", "edgelora", "train", str(tiny.path), str(rows), "--out", str(out)]
    with subprocess.Popen([*command, "--epochs", "500"], stderr=subprocess.PIPE, text=True) as child:
        try:
            assert any("train 1/" in child.stderr.readline() for _ in range(40))
            child.send_signal(signal.SIGINT)
            what, why, fix = child.stderr.read().splitlines()[-3:]
        except BaseException:
            child.kill()  # else the block would wait for 500 epochs
            raise
    assert child.returncode == 130
    assert re.fullmatch(r"stopped behind step \d+ of \d+; nothing is lost", what)
    assert why == "  why: Ctrl-C"
    assert fix.startswith("  fix: go on with: ")
    assert fix.endswith("--resume")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.run"]


@pytest.mark.parametrize(("stop", "code", "why"), [
    (KeyboardInterrupt(), 130, "Ctrl-C"), (SystemExit(143), 143, "the signal SIGTERM"),
])  # fmt: skip
def test_a_stop_before_a_checkpoint_says_that_nothing_was_saved(files, tmp_path, monkeypatch, capsys, stop, code, why):
    def stopped(*_):
        raise stop

    monkeypatch.setattr("edgelora.training.ready.load_rows", stopped)
    assert run(trains(files, tmp_path / "mine")) == code
    assert capsys.readouterr().err.splitlines() == [
        "stopped at once, before there was a checkpoint: nothing was saved",
        f"  why: {why}",
        "  fix: give the same command again",
    ]
    assert list(tmp_path.iterdir()) == []


def test_choices_are_said_with_their_reasons_before_the_first_step(files, tmp_path, capsys):
    assert run(trains(files, tmp_path / "mine")) == 0
    said = capsys.readouterr().err
    assert said.index("base_dtype: blocks (") < said.index("train 1/")
    assert said.index("learning_rate: 0.001 (") < said.index("train 1/")
    assert "export" in said.splitlines()[-1]  # what to type next


def test_the_result_as_json(files, tmp_path, capsys):
    assert run(trains(files, tmp_path / "mine", "--json", "--valid", str(files.rows))) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert (found["out"], found["folder"]) == (str(tmp_path / "mine"), str(tmp_path / "mine.run"))
    assert (found["steps"], found["adapter_of_step"], found["rows"], found["skipped_steps"]) == (1, 1, 4, 0)
    assert all(found[name] > 0 for name in ("seconds", "tokens_per_s", "peak_bytes", "last_loss", "held_out_loss"))
    events = [json.loads(line) for line in shown.err.splitlines()]
    assert {event["event"] for event in events} == {"said", "choice", "note", "progress"}
    chosen = {e["name"]: (e["value"], bool(e["why"])) for e in events if e["event"] == "choice"}
    assert (chosen["base_dtype"], chosen["learning_rate"]) == (("blocks", True), ("0.001", True))
    assert [e["step"] for e in events if e["event"] == "progress"] == [0, 1]


def test_whole_weights_are_merged_next(files, tmp_path, capsys):
    assert run(trains(files, tmp_path / "mine", "--method", "full", "--base-dtype", "f32")) == 0
    assert " merge " in capsys.readouterr().err.splitlines()[-1]
    assert run(["train", str(files.base), str(files.rows), "--out", str(tmp_path / "mine"), "--resume"]) == 0
    assert " merge " in capsys.readouterr().err.splitlines()[-1]  # the method is the earlier run's


def test_settings_in_a_file_are_overridden_on_the_command_line(files, tmp_path, capsys):
    words = ["train", "--config", str(files.settings), "--out", str(tmp_path / "mine"), "--max-steps", "1"]
    assert run([*words, "--rank", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 1
    assert json.loads((tmp_path / "mine" / "adapter_config.json").read_text())["r"] == 3


def test_what_print_config_prints_is_a_config(files, tmp_path, capsys):
    words = trains(files, tmp_path / "mine", "--optimizer", "lion", "--samples", 'Say "hi"\n', "--tensorboard")
    assert run([*words, "--print-config"]) == 0
    first = capsys.readouterr().out
    (tmp_path / "printed.toml").write_text(first, encoding="utf-8")
    assert run(["train", "--config", str(tmp_path / "printed.toml"), "--print-config"]) == 0
    assert capsys.readouterr().out == first
    assert 'optimizer = "lion"' in first
    assert "# learning_rate = " in first  # left to be chosen
    assert [p.name for p in tmp_path.iterdir()] == ["printed.toml"]


def test_print_config_alone_leaves_blanks(capsys):
    assert run(["train", "--print-config", "--rank", "8"]) == 0
    shown = capsys.readouterr().out
    settings = tomllib.loads(shown)
    assert settings["rank"] == 8
    assert not {"base", "data", "out"} & settings.keys()
    assert all(f"\n# {name} =   # required\n" in shown for name in ("base", "data", "out"))
    assert run(["train", "--print-config", "--rank", "0"]) == 1


def test_a_run_that_was_begun_is_not_overwritten_unasked(files, tmp_path, capsys):
    (tmp_path / "mine.run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert run(trains(files, tmp_path / "mine")) == 1
    assert "the checkpoints of a run stand here" in capsys.readouterr().err
    assert run(trains(files, tmp_path / "mine", "--overwrite")) == 0
