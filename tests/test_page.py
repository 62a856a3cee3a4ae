"""The report's page: whole without a network, the same structure whatever a model answers, and a schema that holds."""

from __future__ import annotations

import importlib
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import ROOT
from made_up_report import LEVELS, NASTY, TOKENS, made_up_cell, made_up_report
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from edgelora.cli import app
from edgelora.errors import DataError, FileFormatError
from edgelora.evaluate import report as columns
from edgelora.evaluate.cells import (
    CellResult,
    Measure,
    Report,
    UsedFile,
    cell_from_json,
    cell_to_json,
    report_from_json,
)
from edgelora.evaluate.page import view
from edgelora.evaluate.page.bits import bits_map
from edgelora.evaluate.page.html import html
from edgelora.evaluate.page.markdown import escape, fenced, markdown
from edgelora.evaluate.page.plot import Axis, Bubble, Line, Text, pareto_plot
from edgelora.evaluate.recommend import Choice, recommend
from edgelora.evaluate.two_reports import compare_reports
from edgelora.pipeline.page import read_report, write_page


@pytest.fixture(scope="module")
def made_up() -> tuple[Report, Choice]:
    report = made_up_report()
    return report, recommend(report.cells)


def without_nasty(report: Report) -> Report:
    """The same report, its hostile texts replaced by plain ones."""
    text = report.to_json().replace(json.dumps(NASTY, ensure_ascii=False)[1:-1], "plain")
    assert "alert" not in text
    return report_from_json(text, "plain")


class Structure(HTMLParser):
    """Tags with the names of their attributes, and the values of those that could load or run something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.active: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.active += [value for name, value in attrs if name in ("src", "href", "action") or name.startswith("on")]

    def handle_data(self, data):
        self.text.append(data)


# -- JSON -------------------------------------------------------------------------------------------------------------


def test_a_report_is_what_it_was_after_writing_and_reading(made_up):
    report, _ = made_up
    assert report_from_json(report.to_json(), "x") == report
    assert cell_from_json(cell_to_json(report.cells[0]), "x") == report.cells[0]


def test_no_number_is_null_in_strict_json():
    def refuse(constant):
        raise AssertionError(constant)

    cell = CellResult("live", "Q4_0", measures={"loss": Measure(math.nan, (1.0, math.inf))})
    assert json.loads(cell_to_json(cell), parse_constant=refuse)["measures"]["loss"]["value"] is None
    found = cell_from_json(cell_to_json(cell), "x")
    assert math.isnan(found.measures["loss"].value)
    assert math.isnan(found.speed.load_seconds)
    assert found.measure("loss") is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"format": 2}, "format: Input should be 1"),
        ({"extra": 1}, "extra: Unexpected keyword argument"),
        ({"cells": [{"way": "sideways", "quant": "Q4_0"}]}, "cells.0.way: "),
    ],
)
def test_a_file_that_is_no_report_is_refused_with_the_place(made_up, change, why):
    broken = json.loads(made_up[0].to_json()) | change
    with pytest.raises(FileFormatError) as e:
        report_from_json(json.dumps(broken), "r.json")
    assert e.value.what == "r.json: this is no report of format 1"
    assert e.value.why.startswith(why)


def test_the_schema_is_documented(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    written = importlib.import_module("report_schema").written()
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    assert written == page, "run: python benchmarks/report_schema.py"


# -- HTML -------------------------------------------------------------------------------------------------------------


def test_what_a_model_answers_changes_nothing_but_text(made_up):
    report, choice = made_up
    hostile, plain = Structure(html(report, choice)), Structure(html(without_nasty(report), choice))
    assert hostile.tags == plain.tags
    assert hostile.active == []
    shown = "".join(hostile.text)
    assert view.printable(NASTY) in shown
    assert "\\x1b[31m\\u202e" in shown  # what cannot be seen is written out


def test_the_page_needs_no_network_and_runs_no_script(made_up):
    page = html(*made_up)
    assert {tag for tag, _ in Structure(page).tags} & {"script", "link", "iframe", "img", "object", "form"} == set()
    assert not re.search(r"https?:|url\(|@import", page)
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_every_part_stands_on_the_page(made_up):
    page, (report, choice) = html(*made_up), made_up
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Quality over size", "All that was measured", "Speed", "Your task", "Against the reference",
        "What the adapter cost", "Bits of each tensor", "Sample answers", "Where this comes from",
    ]  # fmt: skip
    for file in report.provenance.data:
        assert file.sha256 in page
    assert "edgelora report base.gguf --adapter &#34;my home&#34;" in page
    assert [line for line in choice.why.splitlines() if f"<p>{line}</p>" not in page] == []


@pytest.mark.parametrize(
    "cells", [(), (CellResult("merged", "Q4_0", "failed", "it crashed"),), (made_up_cell("merged", "Q4_K_M"),)]
)
def test_a_report_of_little_is_a_page_too(made_up, tmp_path, cells):
    report = replace(made_up[0], cells=cells)
    (tmp_path / "report.png").touch()  # of an older report
    choice = write_page(report, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (choice.cell or "None") in page
    assert "Quality over size" not in page
    assert "report.png" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_the_files_are_written_whole(made_up, tmp_path):
    choice = write_page(made_up[0], tmp_path)
    assert choice == made_up[1]
    assert read_report(tmp_path) == read_report(tmp_path / "report.json") == made_up[0]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html(*made_up)


@pytest.mark.parametrize("write", [html, markdown])
def test_what_torch_computed_is_said_and_neither_best_nor_drawn_as_such(made_up, write):
    report, choice = made_up
    why = f"computed in torch (it is <b>no</b> LoRA {NASTY})"
    cell = replace(made_up_cell("merged", "Q4_K_M"), way="torch", why=why, size_bytes=1)
    with_torch = replace(report, cells=(*report.cells, cell, replace(cell, quant="Q2_K")))
    assert recommend(with_torch.cells).cell == choice.cell
    page = write(with_torch, choice)
    assert page.count("computed in torch (it is") == 1  # the reason once, whatever the levels
    assert "never recommended" in page
    assert "never recommended" not in write(report, choice)
    _, rows = view.table(with_torch, choice)
    assert not any(value.is_best for row in rows if row.way == "torch" for value in row.values)
    drawing = pareto_plot(with_torch.cells, "right", "", 760, 430)
    assert {b.is_faded for b in drawing.shapes if isinstance(b, Bubble) and b.way == "torch"} == {True}


# -- Markdown ---------------------------------------------------------------------------------------------------------


def test_markdown_has_the_same_structure_whatever_a_model_answers(made_up):
    def tokens(report: Report) -> list[str]:
        parsed = MarkdownIt().enable("table").parse(markdown(report, made_up[1]))
        inner = [child.type for token in parsed for child in token.children or ()]
        return [token.type for token in parsed] + inner

    report = made_up[0]
    hostile = tokens(report)
    assert hostile == tokens(without_nasty(report))
    assert not {"html_block", "html_inline", "link_open"} & set(hostile)
    assert hostile.count("image") == 1
    assert "table_open" in hostile


@pytest.mark.parametrize("text", [NASTY, "```", "a\n````\nb", "| x |"])
def test_a_fence_is_longer_than_what_stands_in_it(text):
    (token,) = MarkdownIt().parse(fenced(text))
    assert (token.type, token.content) == ("fence", view.printable(text) + "\n")


def test_escaped_text_is_text():
    (_, inline, _) = MarkdownIt().enable("table").parse(escape(NASTY))
    shown = "".join(child.content for child in inline.children)
    assert shown == " ".join(view.printable(NASTY).split())


# -- the plot ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "up"), [("right", 1), ("loss", -1)])
def test_up_is_better_and_right_is_larger(made_up, key, up):
    cells = [cell for cell in made_up[0].cells if cell.way == "merged"]
    drawing = pareto_plot(cells, key, "Q8_0 merged", 760, 430)
    bubbles = {b.title.partition(":")[0]: b for b in drawing.shapes if isinstance(b, Bubble)}
    by_size = sorted(cells, key=lambda c: c.size_bytes)
    xs, ys = zip(*((bubbles[c.name].x, bubbles[c.name].y) for c in by_size), strict=True)
    assert list(xs) == sorted(xs)
    order = np.argsort([up * c.measures[key].value for c in by_size], kind="stable")
    assert list(np.array(ys)[order]) == sorted(ys, reverse=True)  # pixels are counted from the top
    # area goes with speed
    a, b = bubbles["Q2_K merged"], bubbles["Q8_0 merged"]
    assert (a.radius / b.radius) ** 2 == pytest.approx(LEVELS["Q8_0"][0] / LEVELS["Q2_K"][0])
    assert [b.title for b in bubbles.values() if b.is_chosen] == [b.title]


@pytest.mark.parametrize("size", [(760.0, 430.0), (380.0, 400.0)])
def test_nothing_leaves_the_drawing_and_labels_cover_no_label(made_up, size):
    drawing = pareto_plot(made_up[0].cells, "right", "", *size)
    points = [point for shape in drawing.shapes if isinstance(shape, Line) for point in shape.points]
    assert all(0 <= x <= size[0] and 0 <= y <= size[1] for x, y in points)
    labels = [shape for shape in drawing.shapes if isinstance(shape, Text) and shape.role == "label"]
    boxes = [(t.x, t.y - 10, t.x + 6.5 * len(t.text), t.y) for t in labels]
    assert all(box[0] >= 0 and box[2] <= size[0] for box in boxes)
    covered = [
        (a, b) for i, a in enumerate(boxes) for b in boxes[:i]
        if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
    ]  # fmt: skip
    assert covered == []


def test_the_frontier_is_drawn_and_what_it_beats_is_faded(made_up):
    drawing = pareto_plot(made_up[0].cells, "right", "", 760, 430)
    (line,) = [shape for shape in drawing.shapes if isinstance(shape, Line) and shape.role == "frontier"]
    bright = [b for b in drawing.shapes if isinstance(b, Bubble) and not b.is_faded]
    assert sorted(line.points) == sorted((b.x, b.y) for b in bright)
    assert {b.way for b in bright} == {"merged"}  # live over the same level is as good, and larger
    # the base alone, at 5 %, would press the others together: named instead
    assert len(drawing.far) == len(LEVELS)
    assert drawing.far[0].startswith("Q2_K base alone ")


@pytest.mark.parametrize("span", [1e-4, 0.16, 0.17, 1.0, 3.0, 9.9, 100.0, 280.0])
def test_ticks_are_few_and_round(span):
    ticks = Axis(0.84, 0.84 + span, 0, 100).ticks()
    assert 3 <= len(ticks) <= 9
    step = ticks[1] - ticks[0]
    assert float(f"{step:.0e}") == pytest.approx(step)  # one digit
    assert all(0.84 - 1e-9 <= tick <= 0.84 + span + 1e-9 for tick in ticks)


def test_what_cannot_be_drawn_is_not(made_up):
    one, *others = (cell for cell in made_up[0].cells if cell.way == "merged")
    nan = replace(one, measures={"right": Measure(math.nan)})
    assert pareto_plot([one], "right", "", 760, 430) is None
    assert pareto_plot([nan, others[0]], "right", "", 760, 430) is None
    same = pareto_plot([one, replace(one, way="live")], "right", "", 760, 430)  # no span at all
    assert all(math.isfinite(b.x + b.y) for b in same.shapes if isinstance(b, Bubble))


# -- the tables -------------------------------------------------------------------------------------------------------


def test_a_row_of_columns_is_a_column_of_the_page(made_up, monkeypatch):
    mine = columns.Column("mine", "my column", "mine", lambda r: r.size_bytes / 1e3, "{:.0f} kB".format, -1)
    monkeypatch.setattr(columns, "COLUMNS", (*columns.COLUMNS, mine))
    titles, rows = view.table(*made_up)
    assert titles[-1] == "my column"
    assert [row.name for row in rows if row.values[-1].is_best] == ["Q2_K base alone", "Q2_K merged"]
    assert "my column" in html(*made_up)
    assert "my column" in markdown(*made_up)


def test_what_is_not_whole_is_never_the_best(made_up):
    report, choice = made_up
    cells = [replace(c, status="partial", why="stopped") if c.quant == "F16" else c for c in report.cells]
    titles, rows = view.table(replace(report, cells=tuple(cells)), choice)
    best = [row.name for row in rows if row.values[titles.index("JSON equality")].is_best]
    assert best == ["Q8_0 adapter live", "Q8_0 merged"]
    assert [row.note for row in rows if row.name == "F16 merged"] == ["partial: stopped"]
    (section, *_) = view.sections(replace(report, cells=tuple(cells)))
    assert [line.verdict for line in section.lines if line.name.startswith("F16")] == ["partial"] * 3


def test_forgetting_is_measured_against_the_base_of_the_same_level(made_up):
    ((title, changes), (choice_title, _)) = view.forgetting(made_up[0])
    assert (title, choice_title) == ("perplexity", "multiple choice: arc-easy")
    assert [(c.name, c.base) for c in changes][-1] == ("F16 merged", "F16 base alone")
    # made up so: 0.05 nats a token in every window
    assert {(c.change, c.verdict) for c in changes} == {("+0.050 nats (95 %: +0.050 … +0.050)", "clearly worse")}
    alone = [c for c in made_up[0].cells if c.way != "base" or c.quant == "Q4_K_M"]
    assert {c.base for c in view.forgetting(replace(made_up[0], cells=tuple(alone)))[0][1]} == {"Q4_K_M base alone"}


def test_the_map_of_bits_puts_like_layers_together():
    found = bits_map(made_up_cell("merged", "Q4_K_M").tensor_types | {"blk.0.attn_q.bias": "F32", "odd": "NO_TYPE"})
    assert found.columns == ("ffn_down", "attn_q")
    assert [(name, [bits.text for bits in row]) for name, row in found.lines] == [
        ("0–1", ["Q6_K", "Q4_K"]), ("2–5", ["Q4_K", "Q4_K"]),
    ]  # fmt: skip
    assert found.lines[1][1][0].bits == 4.5  # 144 bytes for 256 weights
    assert [(name, bits.text) for name, bits in found.others] == [("token_embd", "Q8_0")]
    assert found.vectors == 8  # six norms of layers, one behind them, one bias
    assert bits_map({}) is None


def test_speed_says_its_spread(made_up):
    line = next(line for line in view.speeds(made_up[0]) if line.name == "Q2_K merged")
    assert (line.prompt, line.prompt_range, line.generation_range, line.load) == ("900", "880 … 905", "–", "0.30 s")
    assert "Q2_K merged, imatrix" not in [line.name for line in view.speeds(made_up[0])]  # it failed


def test_like_answers_are_one(made_up):
    first, second = view.answers(made_up[0])
    assert [(a.text, len(a.who), a.is_expected) for a in first.given] == [("light on", 15, True)]
    assert [(a.text, len(a.who), a.is_expected) for a in second.given] == [("lamp: on", 12, True), (NASTY, 3, False)]


# -- two reports ------------------------------------------------------------------------------------------------------


def test_a_report_equals_itself(made_up):
    report = made_up[0]
    found = compare_reports(report, report, ("a", "b"))
    assert {pair.verdict for pair in found.pairs} == {"equal"}
    assert (found.settings, found.only_before, found.only_after) == ((), (), ())


def test_a_change_is_told_from_noise(made_up):
    report = made_up[0]
    cell = next(c for c in report.cells if c.name == "Q8_0 merged")
    worse = tuple(row + 0.1 * TOKENS for row in cell.measures["perplexity"].rows)
    changed = replace(cell.measures["perplexity"], value=cell.measures["perplexity"].value * math.exp(0.1), rows=worse)
    other = replace(
        report, cells=(replace(cell, measures=cell.measures | {"perplexity": changed}),),
        provenance=replace(report.provenance, threads=2),
    )  # fmt: skip
    found = compare_reports(report, other, ("a", "b"))
    assert [(p.measure, p.change) for p in found.pairs if p.verdict == "clearly worse"] == [
        ("perplexity", "+0.100 nats (95 %: +0.100 … +0.100)")
    ]
    assert found.settings == ("threads: 1 → 2",)
    assert len(found.only_before) == 14
    assert "Q2_K merged, imatrix" not in found.only_before  # it failed: there is nothing to compare


def test_methods_are_compared_as_live_as_each_can_be(made_up):
    """A LoRA, a DoRA and a Houlsby adapter of the same rows: live, patched and in torch."""
    report, files = made_up[0], {name: UsedFile("adapter", name, name * 8, 1) for name in ("lora", "dora")}
    live, other = (
        replace(
            report, cells=(made_up_cell("base", "Q8_0"), *(replace(made_up_cell("live", q), way=way) for q in quants)),
            provenance=replace(report.provenance, files=(files[name],)),
        )
        for way, quants, name in (("live", ("Q4_K_M", "Q8_0"), "lora"), ("patched", ("Q8_0", "Q2_K"), "dora"))
    )  # fmt: skip
    found = compare_reports(live, other, ("a", "b"))
    assert {pair.cell for pair in found.pairs} == {"Q8_0 base alone", "Q8_0 adapter live → patched base"}
    assert (found.only_before, found.only_after) == (("Q4_K_M adapter live",), ("Q2_K patched base",))
    assert found.files == ("adapter: lora (sha256 loraloralora…) → dora (sha256 doradoradora…)",)
    in_torch = replace(made_up_cell("live", "Q8_0"), way="torch")
    two = compare_reports(live, replace(other, cells=(*other.cells, in_torch)), ("a", "b"))
    assert {pair.cell for pair in two.pairs} == {"Q8_0 base alone"}  # either could be meant


def test_reports_of_different_data_are_refused_with_their_digests(made_up):
    report = made_up[0]
    task, text = report.provenance.data
    other = replace(report, provenance=replace(report.provenance, data=(replace(task, sha256="c" * 64), text)))
    with pytest.raises(DataError) as e:
        compare_reports(report, other, ("a.json", "b.json"))
    assert e.value.what == "a.json and b.json were measured on different data"
    assert e.value.why == ("task: home.jsonl (sha256 aaaaaaaaaaaa…) against home.jsonl (sha256 cccccccccccc…)")
    only_text = replace(report, provenance=replace(report.provenance, data=(replace(text, role="choice"),)))
    with pytest.raises(DataError, match="different data"):
        compare_reports(report, only_text, ("a", "b"))


def test_a_measure_that_is_not_known_is_refused(made_up):
    odd = replace(made_up[0].cells[0], measures={"vibes": Measure(1.0)})
    report = replace(made_up[0], cells=(odd,))
    with pytest.raises(FileFormatError) as e:
        compare_reports(report, report, ("a", "b"))
    assert e.value.what == "vibes: there is no measure of that name"


def test_the_command_compares_files_and_folders(made_up, tmp_path):
    report = made_up[0]
    (tmp_path / "report.json").write_text(report.to_json(), encoding="utf-8")
    paths = [str(tmp_path), str(tmp_path / "report.json")]
    done = CliRunner().invoke(app, ["compare", *paths])
    assert done.exit_code == 0, done.output
    assert "Q8_0 merged" in done.output
    found = json.loads(CliRunner().invoke(app, ["compare", *paths, "--json"]).stdout)
    assert {pair["verdict"] for pair in found["pairs"]} == {"equal"}
    missing = CliRunner().invoke(app, ["compare", str(tmp_path / "none.json"), paths[0]])
    assert isinstance(missing.exception, FileFormatError)
    assert "cannot be read" in missing.exception.what
