"""Every recipe in examples/recipes trains, says why each of its values, and stands in the README."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from edgelora.cli.options import settled
from edgelora.config import TrainConfig
from edgelora.training.run import run_training

FOLDER = ROOT / "examples" / "recipes"
RECIPES = sorted(FOLDER.glob("*.toml"))

# rows of the kind that each recipe is for
CHAT = {"messages": [{"role": "user", "content": "Turn it on"}, {"role": "assistant", "content": "It is on."}]}
ROWS: dict[str, dict[str, Any]] = {
    "chat-cpu": CHAT,
    "short-answers": {"prompt": "Is it on?", "completion": "yes"},
    "style": {"text": "It was late when the lights went out in every room of the house."},
    "dpo": {"prompt": "Turn it on", "chosen": "It is on.", "rejected": "No."},
    "8b-12gb": CHAT,
}
# what a machine without a card cannot have
ON_A_CARD = {"device": "cpu", "optimizer": "adamw", "max_gpu_memory": None}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_on_rows_of_its_kind(recipe, tiny, tmp_path):
    (tmp_path / "rows.jsonl").write_text((json.dumps(ROWS[recipe.stem]) + "\n") * 4, encoding="utf-8")
    places = {"base": tiny.path, "data": tmp_path / "rows.jsonl", "valid": tmp_path / "rows.jsonl"}
    config = settled(TrainConfig, recipe, {**places, "out": tmp_path / "mine", "max_steps": 2})
    assert config.model_fields_set >= tomllib.loads(recipe.read_text(encoding="utf-8")).keys()
    if config.device == "cuda":
        config = TrainConfig.model_validate({**config.model_dump(exclude_unset=True), **ON_A_CARD})
    run = run_training(config)
    assert run.out.is_dir()
    assert run.held_out_loss is not None


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_why_each_of_its_values(recipe):
    lines = recipe.read_text(encoding="utf-8").splitlines()
    settings = [i for i, line in enumerate(lines) if line and not line.startswith("#")]
    assert settings
    assert [lines[i] for i in settings if not lines[i - 1].startswith("# ")] == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_how_it_is_used(recipe):
    text = recipe.read_text(encoding="utf-8")
    assert re.findall(r"--config (\S+)", text) == [recipe.relative_to(ROOT).as_posix()]


def test_the_readme_lists_every_recipe():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[(\S+)\]\((\S+)\) \|", text, re.M) != []
    listed = {name for pair in re.findall(r"^\| \[(\S+)\]\((\S+)\) \|", text, re.M) for name in pair}
    assert listed == {path.name for path in RECIPES}
    assert {Path(name).stem for name in listed} == ROWS.keys()
