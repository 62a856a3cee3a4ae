"""What a run asks of its device is there before it begins, or refused; a plan may be that of another machine."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
from example_runs import configs, example_rows

from edgelora.base.decoder import COMPUTE
from edgelora.cli import run
from edgelora.errors import ConfigError
from edgelora.nn import gpu_attention
from edgelora.nn.scores import Scores
from edgelora.pipeline.plan import plan_run
from edgelora.pipeline.sweep import run_sweep
from edgelora.training import run as runs
from edgelora.training import settle as module
from edgelora.training.run import run_training
from edgelora.training.settle import choose_attention, here

GB = 10**9
ON_A_CARD = {
    "max_gpu_memory": "--max-gpu-memory 8GB: this run computes on cpu",
    "optimizer": "optimizer adamw8bit: there is no CUDA device in this run",
}
GIVEN = {"max_gpu_memory": "8GB", "optimizer": "adamw8bit"}


@pytest.fixture
def settings(tiny, tmp_path):
    """`settings(out, **changes)`: two steps over the tiny model on the CPU."""
    rows = example_rows(tmp_path / "rows.jsonl", 0, 8)
    return configs(base=tiny.path, data=rows, valid=rows, rank=2, batch_rows=4, max_steps=2, device="cpu")


@pytest.fixture
def card(monkeypatch):
    """`card(free)`: as if there were one of 24 GB, of which so many bytes are free."""

    def is_one(free):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 24 * GB))
        named = SimpleNamespace(name="Imagined 3090", total_memory=24 * GB)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: named)

    return is_one


# -- a run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_A_CARD)
def test_what_only_a_card_has_is_refused_before_a_run_begins(settings, tmp_path, name):
    before = list(tmp_path.iterdir())
    with pytest.raises(ConfigError) as fault:
        run_training(settings(tmp_path / "mine", **{name: GIVEN[name]}))
    assert fault.value.what == ON_A_CARD[name]
    assert list(tmp_path.iterdir()) == before  # no folder, and no lock in it


@pytest.mark.parametrize("name", ON_A_CARD)
def test_what_only_a_card_has_is_refused_before_the_first_trial(settings, tmp_path, name):
    word = f"{name}={GIVEN[name]}"
    words = ["optimizer=adamw,adamw8bit"] if name == "optimizer" else [word, "rank=2,4"]
    with pytest.raises(ConfigError) as fault:
        run_sweep(settings(tmp_path / "mine"), words)
    n = 2 if name == "max_gpu_memory" else 1
    assert fault.value.what.startswith(f"{n} of 2 trials cannot be trained, such as {word}")
    assert fault.value.what.endswith(ON_A_CARD[name])
    assert not (tmp_path / "mine.sweep").exists()


def test_eight_bits_want_their_package_on_a_card(card, settings, monkeypatch):
    card(24 * GB)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="bitsandbytes is not installed"):
        here(settings("-", optimizer="adamw8bit"), "cuda")


@pytest.mark.parametrize(
    ("free", "given", "budget"), [(20, "8GB", 8), (6, "8GB", 6), (20, None, 20)], ids=["given", "free", "all"]
)
def test_a_run_is_planned_with_what_is_free_of_what_it_may_take(card, settings, free, given, budget):
    card(free * GB)
    assert here(settings("-", max_gpu_memory=given), "cuda").budget == budget * GB


def test_more_than_the_card_has_is_refused(card, settings):
    card(20 * GB)
    with pytest.raises(ConfigError, match=r"Imagined 3090 has 24\.00 GB"):
        here(settings("-", max_gpu_memory="80GB"), "cuda")


def test_a_run_is_held_to_what_it_was_given(settings, tmp_path, monkeypatch):
    """On its own card, before a weight is there."""

    class Held(Exception):
        pass

    def held(*asked):
        raise Held(*asked)

    monkeypatch.setattr(module, "held_bytes", lambda *_: 8 * GB)
    monkeypatch.setattr(runs, "hold_to", held)
    monkeypatch.setattr(runs, "build_decoder", None)
    with pytest.raises(Held) as found:
        run_training(settings(tmp_path / "mine", max_gpu_memory="8GB"))
    assert found.value.args == ("8GB", "cpu")


@pytest.mark.parametrize(
    ("head_dim", "dtype", "has_triton", "value"),
    [(64, "bf16", True, "flash"), (64, "bf16", False, "torch"), (60, "bf16", True, "torch"),
     (512, "bf16", True, "torch"), (64, "f32", True, "torch")],
)  # fmt: skip
def test_attention_is_said_to_be_what_the_card_computes(monkeypatch, head_dim, dtype, has_triton, value):
    asked = []
    monkeypatch.setattr(module, "has_triton", lambda device: asked.append(device) or has_triton)
    assert choose_attention(head_dim, "cuda:1", dtype).value == value
    assert set(asked) <= {torch.device("cuda", 1)}
    monkeypatch.setattr(gpu_attention, "has_triton", lambda _: has_triton)
    q = torch.zeros(2, 1, head_dim, dtype=COMPUTE[dtype])
    assert gpu_attention.usable(Scores(0.1), q) == (value == "flash")


# -- a plan -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "budget"),
    [(["--memory", "24GB"], 24), ([], 4), (["--memory", "24GB", "--optimizer", "adamw8bit"], 24)],
    ids=["memory", "recipe", "eight bits"],
)
def test_a_plan_is_that_of_the_memory_it_is_given(tiny, tmp_path, capsys, words, budget):
    recipe = tmp_path / "g.toml"
    recipe.write_text('max_gpu_memory = "4GB"\n', encoding="utf-8")
    assert run(["plan", str(tiny.path), "--config", str(recipe), "--device", "cpu", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["budget_bytes"] == budget * GB


def test_a_plan_for_a_card_that_is_here_is_that_of_its_run(card, settings, monkeypatch):
    """But for the memory that it is given, which is taken as it is."""
    card(3 * GB)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    config = settings("-", device="cuda", max_gpu_memory="4GB")
    assert [plan_run(config, memory)[1].budget for memory in (None, 30 * GB)] == [3 * GB, 30 * GB]
