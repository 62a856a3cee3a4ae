"""`--ways live` of what is no LoRA for llama.cpp: a patched base, or torch's figures, which nobody takes for its."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from gguf.constants import GGMLQuantizationType as Type
from test_evaluate import ARC, write_lines
from test_export import make_adapter
from test_methods import stir
from test_report_command import TEXT

from converters.merge import Part
from converters.patch import plan_patch, write_patched, write_rest
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.cli import run
from edgelora.errors import AdapterError, ConfigError
from edgelora.files.contract import sha256_file
from edgelora.peft.adapter import Adapter, write_adapter, write_folder
from edgelora.peft.inject import adapter_config, collect, inject
from edgelora.peft.methods import METHODS
from edgelora.peft.soft_prompt import SAVED
from edgelora.peft.targets import Where
from edgelora.peft.virtual_settings import VirtualTokens
from edgelora.peft.virtual_tokens import saved
from edgelora.pipeline.engines import TORCH
from edgelora.pipeline.export import read_checked
from edgelora.pipeline.grid import Asked, Grid, Place
from edgelora.pipeline.grid_cell import UNFINISHED
from edgelora.pipeline.grid_files import Survey, Workshop
from edgelora.pipeline.grid_live import how_live
from edgelora.pipeline.page import read_report
from edgelora.pipeline.perplexity import Run, measure
from edgelora.pipeline.report import Heard, make_report
from edgelora.training.interrupt import Stopped

RANK, ALPHA = 4, 8.0


@pytest.fixture(scope="module")
def base(make_tiny):
    return open_base(make_tiny(Type.F16).path)


@pytest.fixture(scope="module")
def write(base, tmp_path_factory):
    """`write(method)`: the folder of an adapter that has learned something."""
    room, known = tmp_path_factory.mktemp("adapters"), dict[str, Path]()

    def make(method: str) -> Path:
        if method not in known:
            row, folder, decoder = METHODS[method], room / method, build_decoder(base)
            where = Where(
                virtual=VirtualTokens(5) if row.before else VirtualTokens(), token_indices=(7, 8) if row.rows else (),
                alora_invocation_tokens=(9, 10) if row.waits else (),
            )  # fmt: skip
            inject(decoder, method, RANK, ALPHA, 0, where)
            stir(decoder)
            config = adapter_config(decoder, method, RANK, ALPHA, str(base.path), where)
            if row.before:
                write_folder(folder, config, {SAVED: saved(decoder)}, None)
            else:
                write_adapter(folder, Adapter(config, collect(decoder)))
            known[method] = folder
        return known[method]

    return make


@pytest.fixture(scope="module")
def ask(base, write, tmp_path_factory):
    """`ask(method, quant)`: its way `live` over that level, on a text and two questions."""
    room = tmp_path_factory.mktemp("room")
    (room / "text.txt").write_text(TEXT, encoding="utf-8")
    write_lines(room / "arc.jsonl", [ARC, ARC | {"answer": 0}])

    def make(method: str, quant: str = "F16") -> Asked:
        return Asked(
            base.path, room / f"{method}.report", (write(method), 1.0), (quant,), ("live",), (room / "arc.jsonl",),
            room / "text.txt", windows=3, context=64, allow_unverified=True,
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def made(ask):
    """`made(method, quant)`: the report of it, that nobody stopped."""
    return functools.cache(lambda *what: make_report(ask(*what), "x"))


@pytest.mark.parametrize("method", METHODS)
def test_live_is_what_llama_cpp_can_make_of_a_method(base, write, method):
    """The tiny model has one matrix for embedding and head, and an aLoRA is not scored side by side."""
    exits, never = METHODS[method].exits, ("alora", "token_rows")
    expected = next((way for door, way in (("adapter", "live"), ("patched", "patched")) if door in exits), "torch")
    found = how_live(base, write(method), 1.0)
    assert found.way == ("torch" if method in never else expected)
    assert bool(found.why) == (found.way != "live")
    assert found.mergeable == ("merged" in exits)
    if found.way == "patched":
        half = how_live(base, write(method), 0.5)
        assert (half.way, half.why[-3:]) == ("torch", "0.5")


def test_a_dora_is_measured_over_the_base_that_it_patches(ask, base, write):
    asked = replace(ask("dora"), data=())
    made = make_report(asked, "x")
    alone, cell = made.report.cells
    assert [(c.name, c.status) for c in (alone, cell)] == [("F16 base alone", "ok"), ("F16 patched base", "ok")]
    assert [file.role for file in cell.files] == ["model", "adapter"]
    assert cell.path == cell.files[0].path
    assert cell.size_bytes == sum(file.size_bytes for file in cell.files)
    assert cell.speed.switch_seconds is not None
    there = Run(base.path, asked.text, (write("dora"), 1.0), context=64, chunks=3, allow_unverified=True, engine=TORCH)
    assert cell.measures["perplexity"].value == pytest.approx(measure(there).perplexity.value, rel=2e-3)
    assert cell.measures["kl"].value < 1e-3  # against the merged F16
    assert made.choice.file == cell.path
    assert f"with {cell.files[1].path} live over it" in made.choice.why
    rest = made.folder / cell.files[1].path
    rest.unlink()  # the base alone would be another model
    grid, files = Grid.plan(asked), made.folder / "files"
    assert set(Survey(grid, files).missing) == {made.folder / cell.path}
    shipped = Workshop(grid, files).shipped(Place("patched", "F16"))
    assert shipped.adapter == rest
    assert sha256_file(rest) == cell.files[1].sha256


def test_the_forecast_counts_what_becomes_f16_and_what_lies_over_it(ask, make_tiny, write, tmp_path):
    """A LongLoRA's embedding, in blocks of 4 bits before."""
    over = open_base(make_tiny(Type.Q4_K).path)
    asked = replace(ask("longlora", over.quant), base=over.path, data=())
    survey = Survey(Grid.plan(asked), tmp_path)
    (model,) = (path for path in survey.missing if path.name.endswith("-patched.gguf"))
    adapter = read_checked(write("longlora"), over, allow_unverified=True)
    plan = plan_patch(over, adapter)
    write_patched(tmp_path / "mine.gguf", over, plan, Part(adapter, 1.0, "", "mine"))
    write_rest(tmp_path / "rest.gguf", over, plan, "mine", None)
    written = sum((tmp_path / name).stat().st_size for name in ("mine.gguf", "rest.gguf"))
    assert open_base(tmp_path / "mine.gguf").file.tensors["token_embd.weight"].type == Type.F16
    assert survey.missing[model] == pytest.approx(written, rel=0.02)  # but for their headers
    assert over.path.stat().st_size < 0.9 * written


def test_predictions_of_another_torch_are_not_compared_with(ask, tmp_path, monkeypatch):
    surveys = []
    for version in ("2.0", "2.1"):
        monkeypatch.setattr("edgelora.pipeline.grid_files.versions", lambda version=version: {"torch": version})
        surveys.append([Survey(Grid.plan(ask(method)), tmp_path).reference() for method in ("houlsby", "dora")])
    (torchs, merged), (of_another, same) = surveys
    assert torchs != of_another
    assert merged == same  # llama.cpp's, which rests on no torch


@pytest.mark.exhaustive
def test_one_that_was_trained_over_a_level_is_patched_into_that_level(ask, write, tmp_path):
    asked = replace(ask("ia3", "Q8_0"), out=tmp_path / "report", adapter=None, ways=("base",), data=())
    made = make_report(replace(asked, adapters_for={"Q8_0": write("ia3")}), "x")
    alone, cell = made.report.cells
    assert (cell.name, cell.status) == ("Q8_0 trained on it", "ok")
    assert [file.role for file in cell.files] == ["model"]  # of an IA3 nothing is left over it
    assert cell.path.endswith("-Q8_0-patched.gguf")
    assert cell.measures["perplexity"].value != alone.measures["perplexity"].value


@pytest.mark.parametrize(
    ("method", "quant", "most"),
    [("houlsby", "F16", 1e-6), pytest.param("prompt_tuning", "Q8_0", 0.1, marks=pytest.mark.exhaustive)],
)
def test_what_llama_cpp_cannot_score_is_computed_in_torch_and_never_advised(made, ask, write, method, quant, most):
    asked, report = ask(method, quant), made(method, quant)
    alone, cell = report.report.cells
    assert [c.status for c in (alone, cell)] == ["ok", "ok"]
    assert [c.name for c in (alone, cell)] == [f"{quant} base alone", f"{quant} adapter in torch"]
    model = report.folder / cell.files[0].path
    there = Run(model, asked.text, (write(method), 1.0), context=64, chunks=3, allow_unverified=True, engine=TORCH)
    assert cell.measures["perplexity"].value == pytest.approx(measure(there).perplexity.value, rel=1e-5)
    assert cell.measures["perplexity"].rows[0] != pytest.approx(alone.measures["perplexity"].rows[0], abs=0.5)  # nats
    assert abs(cell.measures["kl"].value) < most  # against torch over F16: what the level cost, and F16 costs nothing
    assert "choice/arc" in cell.measures
    assert (cell.path, cell.sha256, cell.speed.peak_bytes, cell.speed.prompt_range) == ("", "", 0, None)
    assert cell.why.startswith(f"computed in torch over this very file ({Grid.plan(asked).live.why}): speed and ")
    assert report.choice.file is None
    assert report.choice.why.startswith("Nothing that was measured is a file to ship: torch computed it.")
    for name in ("report.html", "report.md"):
        assert "never recommended" in (report.folder / name).read_text(encoding="utf-8")
    said = []
    again = make_report(asked, "x", None, Heard(on_say=said.append))
    assert said[0].startswith("2 cells, 2 of them measured before; 0 files to build")
    assert again.report.cells == report.report.cells == read_report(report.folder).cells


def test_a_stopped_cell_of_torch_is_partial_and_is_gone_on_with(made, ask, tmp_path):
    """As a kill before its last part leaves it, and Ctrl-C in that part."""
    asked = replace(ask("houlsby"), out=tmp_path / "report")
    shutil.copytree(made("houlsby").folder, asked.out)
    (kept,) = asked.out.glob("cells/torch-*")
    whole = json.loads(kept.read_text(encoding="utf-8"))
    text = {name: value for name, value in whole["measures"].items() if not name.startswith("choice")}
    kept.write_text(json.dumps(whole | {"status": "partial", "why": UNFINISHED, "measures": text}), encoding="utf-8")

    def press(progress):
        stages.add(progress.stage)
        raise KeyboardInterrupt

    stages = set()
    with pytest.raises(Stopped, match="stopped with 1 of 2 cells measured"):
        make_report(asked, "x", None, Heard(press))
    assert stages == {"F16 adapter in torch: choose"}
    cell = read_report(asked.out).cells[1]
    assert (cell.status, cell.why, set(cell.measures)) == ("partial", UNFINISHED, set(text))
    make_report(asked, "x")
    assert read_report(asked.out).cells == made("houlsby").report.cells


def test_a_base_is_patched_with_the_whole_of_a_folder_alone(ask, write, tmp_path):
    asked = replace(ask("dora"), ways=("patched", "merged"))
    assert Place("patched", "F16") in Grid.plan(asked).places
    with pytest.raises(ConfigError, match=r"--ways patched: .* at the scale 0\.5"):
        Grid.plan(replace(asked, adapter=(write("dora"), 0.5)))
    (tmp_path / "mine.gguf").touch()
    with pytest.raises(ConfigError, match=r"--ways patched: .* is a GGUF adapter"):
        Grid.plan(replace(asked, adapter=(tmp_path / "mine.gguf", 1.0)))


@pytest.mark.parametrize("method", ["houlsby", "prompt_tuning"])
def test_an_adapter_for_a_level_that_is_torchs_is_refused_at_once(ask, write, method):
    asked = replace(ask("dora"), adapter=None, ways=("base",), adapters_for={"F16": write(method)})
    with pytest.raises(ConfigError, match="nothing of it is scored in llama") as caught:
        Grid.plan(asked)
    assert caught.value.why == Grid.plan(ask(method)).live.why
    assert f"--adapter {write(method)} --quants F16" in caught.value.fix


def test_torch_can_be_asked_for_beside_llama_cpp(ask, base, tmp_path):
    write_adapter(tmp_path / "mine", make_adapter(base))
    asked = replace(ask("houlsby"), adapter=(tmp_path / "mine", 1.0), ways=("live", "torch"))
    grid = Grid.plan(asked)
    assert grid.places == (Place("base", "F16"), Place("live", "F16"), Place("torch", "F16"))
    rests = {place.way: set(grid.rests_on(place)) for place in grid.places}
    assert rests["torch"] - rests["live"] == {"torch"}  # the version that computed it
    (tmp_path / "mine.gguf").touch()
    with pytest.raises(ConfigError, match="is a GGUF adapter"):
        Grid.plan(replace(asked, adapter=(tmp_path / "mine.gguf", 1.0)))


def test_an_adapter_that_is_not_there_is_refused_at_once(ask, tmp_path):
    with pytest.raises(AdapterError, match="no adapter here"):
        Grid.plan(replace(ask("houlsby"), adapter=(tmp_path / "mine", 1.0)))


def test_the_command_says_where_a_cell_was_computed(made, ask, write, capsys):
    asked, why = ask("houlsby"), made("houlsby").choice.why
    words = ["report", str(asked.base), "--adapter", str(write("houlsby")), "--quants", "F16", "--ways", "live",
             "--data", str(asked.data[0]), "--text", str(asked.text), "--chunks", "3", "--context", "64",
             "--out", str(asked.out), "--allow-unverified-base", "--json"]  # fmt: skip
    assert run(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["recommended"], found["why"]) == (None, why)
    assert found["cells"][1]["why"].startswith("computed in torch over this very file")
