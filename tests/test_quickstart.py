"""The quickstart's whole path on the real model, on a few rows; and what it found on all of them, in the README."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT

import edgelora.pipeline.quickstart as module
from edgelora.base.model import open_base
from edgelora.files.contract import CONTRACT_KEY, read_contract
from edgelora.files.gguf import GGUFFile
from edgelora.pipeline.quickstart import default_base, quickstart


@pytest.fixture
def small_task(tmp_path, monkeypatch, smollm):
    """16 rows to learn and 8 to answer, in a models folder of their own."""
    task = tmp_path / "examples" / "home"
    task.mkdir(parents=True)
    for name, n in (("train", 16), ("test", 8)):
        rows = (ROOT / "examples" / "home" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:n]
        (task / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    monkeypatch.setenv("EDGELORA_HOME", str(tmp_path / "models"))
    monkeypatch.setattr(module, "example", lambda name: tmp_path / "examples" / name)
    return smollm


@pytest.mark.real
def test_every_step_and_every_file(small_task, tmp_path):
    lines, stages = [], set()
    result = quickstart(lines.append, lambda p: stages.add(p.stage))
    folder = tmp_path / "models" / "quickstart"
    checked = ("home", "home-F16", "home-Q4_K_M", "home-Q8_0")
    files = [f"{name}.{ending}" for name in checked for ending in ("gguf", "certificate.json")]
    assert {p.name for p in folder.iterdir()} == {"home", "home.run", "report.json", "report.md", *files}
    assert result.base.samefile(default_base())
    assert open_base(result.base).fingerprint == open_base(small_task).fingerprint
    assert [row.name for row in result.rows] == [
        "base", "adapter, live", "merged Q8_0", "merged Q4_K_M",
    ]  # fmt: skip
    assert {"train", "score", "check", "merge", "quantize Q8_0", "quantize Q4_K_M"} <= stages
    assert result.certificate.passed
    assert result.certificate.equal_ids == result.certificate.n_prompts == 8
    assert result.run.peak_bytes < 1.2e9
    base, live, q8, _ = (row.scored.all for row in result.rows)
    assert live.loss < base.loss - 0.2  # two steps already teach something
    assert q8.loss == pytest.approx(live.loss, abs=0.1)
    report = json.loads((folder / "report.json").read_text())
    assert report["certificate"]["passed"]
    assert set(report["rows"][0]["groups"]) <= {"known", "new"}
    assert all(
        title in (folder / "report.md").read_text() for title in ("size on disk", "exact match", "held-out loss")
    )
    assert "chat" in result.next_commands[0]
    contract = read_contract(GGUFFile(folder / "home.gguf").get(CONTRACT_KEY, str), "home.gguf")
    assert contract.single_turn
    assert contract.system.startswith("Turn the command into one line of JSON")
    assert len(lines) >= 8


def test_the_examples_are_what_their_readme_says():
    seen = set()
    for name, n_rows in (("train", 600), ("test", 100)):
        text = (ROOT / "examples" / "home" / f"{name}.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        assert len(rows) >= n_rows
        for row in rows:
            answer = json.loads(row["messages"][-1]["content"])
            assert list(answer) == ["device", "room", "action", "value"]
            assert json.dumps(answer, separators=(",", ":")) == row["messages"][-1]["content"]
            assert row["messages"][1]["content"] not in seen  # in no other row, of either file
            seen.add(row["messages"][1]["content"])
    assert [row["group"] for row in rows].count("new") == 50
