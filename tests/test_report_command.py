"""`edgelora report`: a grid built and measured, which goes on where it was stopped; a bad cell costs only itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from gguf import GGUFReader
from gguf.constants import GGMLQuantizationType as Type
from test_evaluate import ARC, write_lines
from test_export import make_adapter

from edgelora.base.model import open_base
from edgelora.cli import run
from edgelora.errors import ConfigError, DataError, EdgeloraError, OutputError
from edgelora.evaluate.recommend import Limits
from edgelora.files.contract import sha256_file
from edgelora.files.lock import locked
from edgelora.peft.adapter import write_adapter
from edgelora.pipeline import grid_cell
from edgelora.pipeline.evaluate import measure_speed
from edgelora.pipeline.grid import Asked, Grid, Place
from edgelora.pipeline.page import read_report
from edgelora.pipeline.perplexity import Run, measure
from edgelora.pipeline.report import Heard, make_report
from edgelora.training.interrupt import Stopped

TEXT = "turn the kitchen lights on, please, and then close the blinds in the bedroom\n" * 12
NAMES = ["F16 base alone", "Q4_K_M adapter live", "F16 adapter live", "Q4_K_M merged", "F16 merged",
         "Q4_K_M trained on it"]  # fmt: skip


@pytest.fixture(scope="module")
def room(make_tiny, tmp_path_factory) -> Path:
    """Two adapters, a task of three rows, a text of four windows, two questions, and rows to learn."""
    folder, base = tmp_path_factory.mktemp("room"), open_base(make_tiny(Type.F16).path)
    write_adapter(folder / "mine", make_adapter(base))
    other = make_adapter(base, seed=1)
    trained_over = other.contract.base_file.model_copy(update={"quant": "Q4_K_M"})
    write_adapter(
        folder / "other", replace(other, contract=other.contract.model_copy(update={"base_file": trained_over}))
    )
    for name, n in (("test", 3), ("train", 12)):
        rows = (ROOT / "examples" / "home" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:n]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    write_lines(folder / "arc_easy.jsonl", [ARC, ARC | {"answer": 0}])
    return folder


@pytest.fixture(scope="module")
def asked(room, make_tiny) -> Asked:
    return Asked(
        make_tiny(Type.F16).path, room / "unused", (room / "mine", 1.0), ("Q4_K_M", "F16"), ("live", "merged"),
        (room / "test.jsonl", room / "arc_easy.jsonl"), room / "text.txt", {"Q4_K_M": room / "other"}, None, 4, 64,
    )  # fmt: skip


@pytest.fixture(scope="module")
def small(asked) -> Asked:
    """Two cells of one part each, beside their speed."""
    return replace(asked, quants=("Q8_0",), ways=("base", "merged"), data=(), adapters_for={})


@pytest.fixture(scope="module")
def made(asked, tmp_path_factory):
    """A report that nobody stopped; its folder is copied, never changed."""
    return make_report(replace(asked, out=tmp_path_factory.mktemp("made") / "report"), "edgelora report …")


@pytest.fixture
def again(made, tmp_path) -> Path:
    return shutil.copytree(made.folder, tmp_path / "again")


def cells(made) -> dict[str, object]:
    return {cell.name: cell for cell in made.report.cells}


def figures(made) -> dict[str, object]:
    """Everything that does not tell the time."""
    return {name: (cell.status, cell.measures, cell.samples, cell.sha256) for name, cell in cells(made).items()}


# -- a whole grid ----------------------------------------------------------------------------------------------------


def test_every_way_at_every_level_is_measured(made, asked):
    found = cells(made)
    assert list(found) == NAMES
    assert {cell.status for cell in found.values()} == {"ok"}
    for cell in found.values():
        assert {"right", "loss", "perplexity", "bits_per_byte", "choice/arc-easy"} <= set(cell.measures)
        assert ("kl" in cell.measures) == (cell.way in ("live", "merged"))
        assert cell.speed.peak_bytes > 10_000_000
        assert (cell.speed.switch_seconds is None) == (cell.way in ("base", "merged"))
        assert len(cell.samples) == 3
        assert cell.tensor_types["blk.0.ffn_up.weight"] == ("F16" if cell.quant == "F16" else "Q4_K")
    merged = found["Q4_K_M merged"]
    assert sha256_file(made.folder / merged.path) == merged.sha256
    assert merged.size_bytes == (made.folder / merged.path).stat().st_size
    live = found["F16 adapter live"]
    assert live.path == str(asked.base)  # as it was given: nothing is built that is there
    assert live.size_bytes == sum(file.size_bytes for file in live.files) > asked.base.stat().st_size


def test_the_reference_is_the_unquantized_result(made, asked):
    found = cells(made)
    assert (found["F16 merged"].measures["kl"].value, found["F16 merged"].measures["same_top"].value) == (0.0, 1.0)
    assert found["F16 adapter live"].measures["kl"].value < 1e-4  # the same function in other steps
    files = {name: made.folder / found[name].path for name in ("F16 merged", "Q4_K_M merged")}
    alone = measure(Run(files["Q4_K_M merged"], asked.text, against=files["F16 merged"], context=64, chunks=4))
    cell = found["Q4_K_M merged"]
    assert cell.measures["perplexity"].value == pytest.approx(alone.perplexity.value)
    assert cell.measures["kl"].value == pytest.approx(alone.divergence.kl.value, rel=0.1)  # its 256 likeliest of 512
    assert cell.measures["kl"].value <= alone.divergence.kl.value
    assert found["F16 base alone"].measures["perplexity"].value != found["F16 merged"].measures["perplexity"].value


def test_an_adapter_of_its_own_runs_over_its_own_level(made):
    other, mine = cells(made)["Q4_K_M trained on it"], cells(made)["Q4_K_M adapter live"]
    assert other.files[0] == mine.files[0]
    assert other.files[1].path.endswith("other.gguf")
    assert other.measures["loss"].value != mine.measures["loss"].value


def test_the_page_and_its_provenance(made, room):
    report = read_report(made.folder)
    assert figures(replace(made, report=report)) == figures(made)
    assert {file.role: file.sha256 for file in report.provenance.data} == {
        "task": sha256_file(room / "test.jsonl"), "text": sha256_file(room / "text.txt"),
        "choice": sha256_file(room / "arc_easy.jsonl"),
    }  # fmt: skip
    assert report.provenance.settings["metric"] == "json"
    assert [sample.prompt for sample in report.samples]
    assert {"report.html", "report.md", "report.json", "report.png"} <= {path.name for path in made.folder.iterdir()}
    assert made.choice.file in {cell.path for cell in report.cells}


# -- stopped, and gone on with ---------------------------------------------------------------------------------------


def test_what_was_measured_is_not_measured_again(asked, made, again):
    heard, said = [], []
    same = make_report(replace(asked, out=again), "x", None, Heard(heard.append, said.append))
    assert heard == []
    assert said == ["6 cells, 6 of them measured before; 0 files to build"]
    assert same.report.cells == made.report.cells


def test_a_file_that_is_gone_is_built_again(asked, made, again):
    """And is the same to the bit, so that what was measured of it stays true."""
    merged = cells(made)["Q4_K_M merged"]
    (again / merged.path).unlink()
    (again / merged.path).with_suffix(".certificate.json").unlink()
    stages = set()
    same = make_report(replace(asked, out=again), "x", None, Heard(lambda progress: stages.add(progress.stage)))
    assert {stage.rpartition(" ")[2] for stage in stages} == {"merge", "check"}
    assert same.report.cells == made.report.cells
    assert sha256_file(again / merged.path) == merged.sha256


def test_other_data_is_measured_and_no_file_built_again(asked, again, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(TEXT[5:], encoding="utf-8")
    stages = set()
    wanted = replace(asked, out=again, text=other, data=(), adapters_for={}, ways=("merged",))
    report = make_report(wanted, "x", None, Heard(lambda progress: stages.add(progress.stage)))
    assert {stage.rpartition(" ")[2] for stage in stages} == {"score"}
    assert {cell.status for cell in report.report.cells} == {"ok"}


def test_limits_change_what_is_recommended(asked, again, made):
    sizes = {cell.name: cell.size_bytes for cell in made.report.cells if cell.way != "base"}
    least = min(sizes, key=sizes.get)
    limited = make_report(replace(asked, out=again), "x", Limits(max_size_bytes=sizes[least]))
    assert limited.choice.cell == least
    nothing = make_report(replace(asked, out=again), "x", Limits(max_size_bytes=1))
    assert nothing.choice.file is None


def test_a_kill_costs_the_cell_in_work_and_no_other(small, room, tmp_path):
    out = tmp_path / "report"
    words = ["report", str(small.base), "--adapter", str(room / "mine"), "--quants", "Q8_0", "--ways", "base,merged",
             "--text", str(small.text), "--chunks", "4", "--context", "64", "--out", str(out)]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "edgelora", *words], cwd=ROOT, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not (kept := finished(out)):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    before = {path: path.stat().st_mtime_ns for path in kept}
    made = make_report(replace(small, out=out), "x")
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert {name: cell.status for name, cell in cells(made).items()} == {"Q8_0 base alone": "ok", "Q8_0 merged": "ok"}


def finished(out: Path) -> list[Path]:
    return [path for path in out.glob("cells/*.json") if json.loads(path.read_text())["status"] == "ok"]


def test_ctrl_c_leaves_a_page_that_says_what_is_missing(small, tmp_path):
    out = tmp_path / "report"

    def press(progress):
        if progress.stage == "Q8_0 merged: score":
            raise KeyboardInterrupt

    with pytest.raises(Stopped) as caught:
        make_report(replace(small, out=out), "the command", None, Heard(press))
    assert caught.value.exit_code == 130
    assert (caught.value.what, caught.value.fix) == (
        f"stopped with 1 of 2 cells measured; {out / 'report.html'} shows them", "go on with: the command"
    )  # fmt: skip
    first, second = read_report(out).cells
    assert (first.status, second.status, second.why) == ("ok", "partial", "it was stopped before its end")
    assert second.speed.peak_bytes  # measured before its text was, and kept
    speeds = []
    made = make_report(replace(small, out=out), "x", None, Heard(lambda progress: speeds.append(progress.stage)))
    assert {cell.status for cell in made.report.cells} == {"ok"}
    assert made.report.cells[1].speed == second.speed
    assert set(speeds) == {"Q8_0 merged: score"}


# -- what fails ------------------------------------------------------------------------------------------------------


def crash(cell, on_progress):
    """A model on which llama.cpp aborts."""
    if "merged" in cell.name:
        os.kill(os.getpid(), signal.SIGSEGV)
    return measure_speed(cell, on_progress)


def test_a_crash_is_in_its_cell_and_the_others_go_on(small, tmp_path, monkeypatch):
    wanted = replace(small, out=tmp_path / "report")
    with monkeypatch.context() as patch:
        patch.setattr(grid_cell, "measure_speed", crash)
        notes = []
        made = make_report(wanted, "x", None, Heard(on_note=notes.append))
    base, merged = made.report.cells
    assert (base.status, merged.status) == ("ok", "failed")
    assert merged.why.startswith("speed: the child process of crash ended without an answer (SIGSEGV)")
    assert notes == [f"Q8_0 merged failed: {merged.why}"]
    assert made.choice.file is None
    assert "SIGSEGV" in (made.folder / "report.html").read_text(encoding="utf-8")
    again = make_report(wanted, "x")  # what failed is tried again
    assert [cell.status for cell in again.report.cells] == ["ok", "ok"]


def test_what_cannot_be_loaded_or_computes_no_numbers_says_why_and_is_not_ranked(small, make_tiny, tmp_path):
    """Files as a damaged disk would leave them: one cut short, one whose last norm is NaN."""
    wanted = replace(small, out=tmp_path / "report", adapter=None, ways=("base",), quants=("Q8_0", "Q4_0", "Q5_0"))
    grid = Grid.plan(wanted)
    for quant in ("Q4_0", "Q5_0"):
        path = wanted.out / "files" / grid.key("quantize", quant, grid.digests["base"]) / f"tiny-{quant}.gguf"
        path.parent.mkdir(parents=True)
        shutil.copy(make_tiny(Type[quant]).path, path)
        if quant == "Q4_0":
            os.truncate(path, 1000)
        else:
            norm = next(t for t in GGUFReader(path, "r+").tensors if t.name == "output_norm.weight")
            norm.data[:] = np.nan
            norm.data.base.flush()
    made = make_report(wanted, "x")
    whole, short, nan = made.report.cells
    assert [cell.status for cell in (whole, short, nan)] == ["ok", "failed", "partial"]
    assert "tiny-Q4_0.gguf" in short.why
    assert nan.why.startswith("text: the model's logits are not finite")
    assert nan.speed.peak_bytes
    assert made.choice.cell == "Q8_0 base alone"


@pytest.mark.parametrize(("changes", "fault", "told"), [
    ({"data": (), "text": None}, ConfigError, "there is nothing to score"),
    ({"context": 512}, DataError, "shorter than one window of 512 tokens"),
    ({"ways": ("life",)}, ConfigError, "--ways life"),
    ({"quants": ("Q4_X",)}, ConfigError, "Q4_X: no such quantization type"),
    ({"quants": ("copy",)}, ConfigError, "--quants COPY"),
    ({"adapter": None, "adapters_for": {}}, ConfigError, "--ways live,merged without an adapter"),
    ({"ways": ("imatrix",)}, ConfigError, "on which rows is importance to be computed"),
    ({"metric": "number"}, DataError, "cannot be scored by number"),
])  # fmt: skip
def test_what_no_cell_could_be_measured_with_is_refused_at_once(asked, tmp_path, changes, fault, told):
    with pytest.raises(fault) as caught:
        make_report(replace(asked, out=tmp_path / "report", **changes), "x")
    assert told in caught.value.what
    assert not (tmp_path / "report").exists()


def test_importance_is_never_computed_on_what_is_scored(asked, room, tmp_path):
    wanted = replace(asked, ways=("imatrix",), calibration=shutil.copy(room / "test.jsonl", tmp_path / "copy.jsonl"))
    with pytest.raises(DataError, match="these are the rows that are scored"):
        Grid.plan(wanted)
    found = Grid.plan(replace(wanted, calibration=room / "train.jsonl"))
    assert [place for place in found.places if place.way == "imatrix"] == [Place("imatrix", "Q4_K_M")]  # F16 has none


def test_a_cell_rests_on_what_it_is_made_of_and_nothing_else(asked, room):
    wanted = replace(asked, ways=("base", "merged", "imatrix"), calibration=room / "train.jsonl")
    grid = Grid.plan(wanted)
    scored = {"base", "task", "text", "choice/arc-easy", "scale", "reference"}
    rests_on = {place.way: grid.rests_on(place) for place in grid.places if place.quant == "Q4_K_M"}
    assert {way: set(found) - scored for way, found in rests_on.items()} == {
        "base": set(), "merged": {"adapter"}, "imatrix": {"adapter", "calibration"}, "trained": {"adapter/Q4_K_M"},
    }  # fmt: skip
    assert all(scored <= set(found) for found in rests_on.values())
    other = Grid.plan(replace(wanted, adapter=(room / "other", 0.5), calibration=room / "arc_easy.jsonl", data=()))
    again = {place.way: other.rests_on(place) for place in other.places if place.quant == "Q4_K_M"}
    changed = {way: {key for key in found if key in scored - set(again[way]) or found[key] != again[way].get(key)}
               for way, found in rests_on.items()}  # fmt: skip
    data = {"task", "choice/arc-easy"}
    assert changed == {
        "base": data, "trained": data, "merged": data | {"adapter", "scale"},
        "imatrix": data | {"adapter", "scale", "calibration"},
    }  # fmt: skip


def test_importance_is_a_file_of_the_cell_that_used_it(small, room, tmp_path):
    wanted = replace(
        small, out=tmp_path / "report", quants=("Q4_0",), ways=("imatrix",), text=None,
        calibration=room / "train.jsonl", data=(room / "arc_easy.jsonl",),
    )  # fmt: skip
    made = make_report(wanted, "x")
    cell = next(cell for cell in made.report.cells if cell.way == "imatrix")
    assert (cell.status, [file.role for file in cell.files]) == ("ok", ["model", "imatrix"])
    for file in cell.files:
        assert sha256_file(made.folder / file.path) == file.sha256
    assert cell.size_bytes == cell.files[0].size_bytes
    assert ("calibration", sha256_file(room / "train.jsonl")) in {
        (file.role, file.sha256) for file in made.report.provenance.files
    }


def test_two_tasks_are_refused(asked, room):
    with pytest.raises(ConfigError, match="two tasks"):
        Grid.plan(replace(asked, data=(room / "test.jsonl", room / "train.jsonl")))


def test_an_adapter_for_a_level_was_trained_over_it(asked, room):
    with pytest.raises(ConfigError, match="it was trained over") as caught:
        Grid.plan(replace(asked, adapters_for={"Q8_0": room / "other"}))
    assert f"--adapter-for Q4_K_M={room / 'other'}" in caught.value.fix


def test_a_limit_that_nothing_is_measured_for_is_refused_at_once(small, tmp_path):
    with pytest.raises(ConfigError, match="there is no task"):
        make_report(replace(small, out=tmp_path / "report"), "x", Limits(min_quality=0.9))


def test_two_at_once_are_refused(small, tmp_path):
    with locked(tmp_path / "lock"), pytest.raises(OutputError, match="a run is at work here"):
        make_report(replace(small, out=tmp_path), "x")


def test_a_full_disk_is_noticed_before_anything_is_built(small, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(EdgeloraError, match=r"the files of the report need [\d,]+ bytes, and 1,000 are free"):
        make_report(replace(small, out=tmp_path / "report"), "x")


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_what_to_ship(asked, made, again, room, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr("typer.launch", opened.append)
    words = [
        "report",
        str(asked.base),
        "--adapter",
        str(room / "mine"),
        "--quants",
        "Q4_K_M,F16",
        "--out",
        str(again),
        "--ways",
        "live,merged",
        "--data",
        str(asked.data[0]),
        "--data",
        str(asked.data[1]),
        "--text",
        str(asked.text),
        "--chunks",
        "4",
        "--context",
        "64",
    ]
    words += ["--adapter-for", f"Q4_K_M={room / 'other'}"]  # fmt: skip
    assert run([*words, "--open"]) == 0
    assert opened == [str((again / "report.html").resolve())]
    shown = capsys.readouterr()
    assert made.choice.why in shown.out
    assert "right: by " in shown.out
    assert f"the page: {again / 'report.html'}" in shown.out
    assert all(" ".join(name.split()[:2]) in shown.out for name in NAMES)  # a long one has two lines
    table, _, _ = shown.out.partition("right: by ")
    assert max(map(len, table.splitlines())) <= 80
    assert run([*words, "--json", "--max-size", "1MB"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [cell["name"] for cell in found["cells"]] == NAMES
    assert found["why"] != made.choice.why
    assert run([*words, "--max-size", "many"]) == 2
    assert "--max-size" in capsys.readouterr().err
    assert run([*words, "--adapter-for", "Q4_K_M"]) == 2
