"""The documentation says what is: generated parts are fresh, paths exist, worked examples work."""

from __future__ import annotations

import importlib
import json
import re
import tomllib
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import typer
from conftest import ROOT

from edgelora.architectures import ARCHITECTURES
from edgelora.base.model import open_base
from edgelora.cli import app
from edgelora.config import Method, Objective, TrainConfig
from edgelora.data import formats
from edgelora.data.conversation import Conversation, DataFormat, Message, read_conversations
from edgelora.data.dataset import LEARNS_FROM
from edgelora.data.encode import Example
from edgelora.data.preference import Pair
from edgelora.evaluate import report
from edgelora.evaluate.protocols import Speed
from edgelora.evaluate.report import COLUMNS, Column, Row, as_json, cells
from edgelora.evaluate.score import Score, Scored
from edgelora.peft import inject as injecting
from edgelora.peft.methods import METHODS
from edgelora.pipeline.quickstart import MODEL, MODEL_SHA256
from edgelora.training.defaults import OBJECTIVE_SHARE
from edgelora.training.objectives import OBJECTIVES
from edgelora.training.objectives.objective import mean_losses

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def a_row(name="x", **speed) -> Row:
    score = Score(10, 9, 100, 20.0, (0.7, 1.0))
    measured = Speed(100.0, 50.0, 0.5, 10**8)
    return Row(name, 10**8, Scored(score, {"known": score}, []), replace(measured, **speed))


def benchmark(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_of_the_readme_are_fresh(monkeypatch):
    assert benchmark("readme", monkeypatch).generated(README) == README, "run: python benchmarks/readme.py"


def test_the_page_of_figures_is_what_was_recorded(monkeypatch):
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert benchmark("performance", monkeypatch).written() == text, "run: python benchmarks/performance.py"


def test_a_figure_that_misses_its_target_does_not_look_like_it(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    table = importlib.import_module("peers.table").table

    def found(speed, memory):
        sides = {
            "stack": {"tokens": 1000, "seconds": 1.0, "peak_bytes": 1000 * 2**20},
            "edgelora": {"tokens": speed, "seconds": 1.0, "peak_bytes": memory * 2**20},
        }
        return [(row.found.partition("×")[0], row.verdict) for row in table({"full-512": {"rounds": [sides]}})]

    assert found(1996, 504) == [("1.996", "NOT MET"), ("0.504", "NOT MET")]
    assert found(2004, 496) == [("2.004", "met"), ("0.496", "met")]
    assert found(1780, 400) == [("1.78", "NOT MET"), ("0.40", "met")]


def test_the_recorded_quickstart_met_its_targets():
    found = json.loads((ROOT / "benchmarks" / "results" / "quickstart-targets.json").read_text(encoding="utf-8"))
    assert len(found) == 6
    assert [row["what"] for row in found if not row["met"]] == []


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_named_paths_exist(text):
    paths = re.findall(r"`?((?:edgelora|converters|runtime|tests|benchmarks|examples)/[\w/]+(?:\.\w+)?)`?", text)
    missing = [p for p in paths if not (ROOT / p).exists()]
    assert paths
    assert not missing


def test_the_catalog_knows_the_quickstarts_model():
    entry = tomllib.loads((ROOT / "models" / "catalog.toml").read_text(encoding="utf-8"))[MODEL]
    assert entry["sha256"] == MODEL_SHA256
    assert entry["architecture"] in ARCHITECTURES


def test_each_worked_example_has_at_most_four_steps():
    sections = re.split(r"^## ", CONTRIBUTING, flags=re.M)
    adding = [s for s in sections if s.startswith("Adding")]
    assert [s.splitlines()[0] for s in adding] == [
        "Adding an architecture", "Adding a PEFT method", "Adding an objective", "Adding a data format",
        "Adding a report column",
    ]  # fmt: skip
    assert all(1 <= len(re.findall(r"^\d\. ", s, flags=re.M)) <= 4 for s in adding)


def test_adding_a_method_is_a_row(tiny, monkeypatch):
    from edgelora.base.decoder import build_decoder

    monkeypatch.setitem(METHODS, "mine", replace(METHODS["lora"], name="mine"))
    assert injecting.inject(build_decoder(open_base(tiny.path)), "mine", 2, 4.0, seed=0)


def test_the_tables_are_what_a_config_can_ask_for():
    assert set(METHODS) == set(get_args(Method))
    assert set(get_args(Objective)) == set(OBJECTIVES) == set(LEARNS_FROM) == set(OBJECTIVE_SHARE)


def test_the_objective_of_the_worked_example_trains(tiny):
    from edgelora.base.decoder import build_decoder

    section = CONTRIBUTING.split("## Adding an objective")[1]
    names: dict[str, object] = {}
    exec(re.search(r"```python\n(.*?)```", section, flags=re.S)[1], names)
    hinge = names["Hinge"]()
    decoder = build_decoder(open_base(tiny.path))
    (parameter, *_) = injecting.inject(decoder, "lora", 2, 4.0, seed=0)
    ids = np.arange(5, 13)
    row = Pair(Example(ids, ids > 9), Example(ids[::-1].copy(), ids > 9))
    (scored,) = mean_losses(hinge, decoder, hinge.pack([row, row], 64), TrainConfig(base="-", data="-", out="-"))
    assert scored.loss.item() == 1.0  # as its docstring says
    scored.loss.backward()
    assert parameter.grad is not None


def test_every_data_format_stands_in_the_readme():
    table = README.split("## Your data")[1].split("```")[0]
    for name, known in formats.DATA_FORMATS.items():
        (line,) = re.findall(rf"^\| `{name}` \|.*$", table, flags=re.M)
        assert all(f"`{key}`" in line for key in known.keys.split())


def test_every_option_of_train_that_the_readme_names_is_one():
    said = README.split("## Training")[1].split("\n## ")[0] + README.split("## Your data")[1].split("\n## ")[0]
    commands = typer.main.get_command(app).commands
    known = {
        option
        for name in ("train", "plan")
        for one in commands[name].params
        for option in (*one.opts, *one.secondary_opts)
    }
    known |= {"--base", "--preview", "--nproc-per-node"}
    named = set(re.findall(r"--[a-z][a-z-]+", said))
    assert named - known == set()
    assert len(named) > 20


def test_adding_a_data_format_is_a_row(tmp_path, monkeypatch):
    def parse(row):
        return Conversation((Message("user", row["question"]), Message("assistant", row["answer"])))

    monkeypatch.setitem(formats.DATA_FORMATS, "faq", DataFormat("question", parse))
    (tmp_path / "faq.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n', encoding="utf-8")
    assert read_conversations(tmp_path / "faq.jsonl")[0].answer == "2"


def test_adding_a_report_column_is_a_row(monkeypatch):
    mine = Column("load_s", "load time", "load", lambda r: r.speed.load_seconds, lambda x: f"{x:.1f} s")
    monkeypatch.setattr(report, "COLUMNS", (*COLUMNS, mine))
    titles, body = cells([a_row(load_seconds=1.25)])
    assert (titles[-1], body[0][-1]) == ("load time", "1.2 s")
    assert as_json([a_row()])[0]["load_s"] == 0.5


def test_a_column_without_values_is_left_out_and_a_missing_one_is_a_dash():
    plain = replace(a_row(), scored=Scored(a_row().scored.all, {}, []))
    assert "known wordings" not in cells([plain])[0]
    titles, body = cells([a_row(), plain])
    assert body[1][titles.index("known wordings")] == "–"
