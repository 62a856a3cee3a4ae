"""Which runs have their passes recorded on a card, and why others have not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from example_runs import example_rows
from gguf.constants import GGMLQuantizationType as Type

from edgelora.base.model import open_base
from edgelora.config import TrainConfig
from edgelora.device import Choice
from edgelora.training import settle
from edgelora.training.base_footprint import Model
from edgelora.training.folder import RunFolder
from edgelora.training.footprint import Load, footprint
from edgelora.training.launches import ONE_BY_ONE, RECORDED, choose_launches, launches_again
from edgelora.training.memory import Machine, plan
from edgelora.training.ready import Listeners, make_ready
from edgelora.training.world import Alone

GB = 10**9


@pytest.fixture
def model(make_tiny):
    return Model.of(open_base(make_tiny(Type.Q8_0).path))


def settled(**given):
    here = {"base": Path("base"), "data": Path("base"), "out": Path("out"), "rank": 4, "alpha": 8.0, "dtype": "bf16"}
    return TrainConfig(**here, base_dtype="blocks", device="cuda", learning_rate=1e-3, **given)


def planned(model, budget=64 * GB, **given):
    return plan(model, settled(**given), Machine("cuda", budget), 2048)


@pytest.mark.parametrize(
    "given",
    [{}, {"method": "rslora"}, {"method": "loraplus"}, {"offload": True}, {"modules_to_save": ("lm_head",)},
     {"objective": "dpo"}, {"neftune_alpha": 5.0}],
    ids=str,
)  # fmt: skip
def test_a_lora_is_recorded(model, given):
    assert choose_launches(planned(model, **given), model, has_flash=True).value == RECORDED


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"cuda_graphs": False}, "cuda_graphs is off"), ({"lora_dropout": 0.1}, "dropout is drawn anew"),
        ({"method": "dora"}, "which the method dora is not"), ({"bias": "all"}, "only of a LoRA alone"),
        ({"modules_to_save": ("k_proj",)}, "only of a LoRA alone"),
    ],
    ids=str,
)  # fmt: skip
def test_why_one_is_not(model, given, why):
    found = planned(model)
    found = replace(found, config=found.config.model_copy(update=given))
    choice = choose_launches(found, model, has_flash=True)
    assert choice.value == ONE_BY_ONE
    assert why in choice.why


def test_a_run_says_how_it_launches(tiny, tmp_path, monkeypatch):
    """On a card that is only said to be there, up to where the base would be moved onto it."""
    card = SimpleNamespace(name="a card", total_memory=24 * GB, major=9)
    for name, found in {
        "is_available": lambda: True, "current_device": lambda: 0, "device_count": lambda: 1,
        "mem_get_info": lambda _: (20 * GB, 24 * GB), "get_device_properties": lambda _: card,
        "set_device": lambda _: None, "is_bf16_supported": lambda **_: True,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, found)
    monkeypatch.setattr(settle, "has_triton", lambda _: True)
    rows, said = example_rows(tmp_path / "rows.jsonl", 0, 24), {}

    def ready(**given):
        config = TrainConfig(base=tiny.path, data=rows, out=tmp_path / "mine", device="cuda", rank=4, **given)
        heard = Listeners(on_choice=lambda name, choice: said.update({name: choice.value}))
        return make_ready(config, RunFolder(config.out), heard, Alone())

    assert ready(dtype="bf16").choices["launches"].value == said["launches"] == RECORDED
    assert ready(dtype="bf16", offload=True).facts["choices"]["launches"]["value"] == RECORDED
    assert ready(dtype="f32").choices["launches"].value == said["launches"] == ONE_BY_ONE


def test_machines_and_models_on_which_none_is(model):
    found = planned(model)
    capped = replace(model, config=replace(model.config, attn_logit_softcapping=50.0))
    for choice in (
        choose_launches(found, model, has_flash=False),
        choose_launches(found, capped, has_flash=True),
        choose_launches(found, model, has_flash=True, processes=2),
    ):
        assert choice.value == ONE_BY_ONE


def test_a_run_that_goes_on_launches_as_it_did_unless_that_cannot_be():
    before, config = Choice(RECORDED, "as it began"), settled()
    assert launches_again(before, config) == before
    assert launches_again(before, config, processes=2).value == ONE_BY_ONE
    assert launches_again(before, config.model_copy(update={"cuda_graphs": False})).value == ONE_BY_ONE


def test_none_is_where_there_is_no_memory_for_it(model):
    """The plan is that of launched passes, and stays; recorded ones are taken where they fit beside it."""
    found = planned(model, micro_batch_tokens=2048)
    load = replace(found.load, recorded=True)
    launched, recorded = (footprint(model, found.config, one, "cuda").total for one in (found.load, load))
    assert launched < recorded
    enough, short = (replace(found, budget=int(n / 0.9) + 10) for n in (recorded, recorded - 10**6))
    assert choose_launches(enough, model, has_flash=True).value == RECORDED
    choice = choose_launches(short, model, has_flash=True)
    assert choice.value == ONE_BY_ONE
    assert f"they would take {recorded / 1e9:.2f} GB" in choice.why


def test_recorded_passes_are_held_beside_one_that_is_launched(model):
    """Of a run with rows of several shapes: once for those that are recorded, once for the next."""
    one = settled()
    kept, again = (footprint(model, one, Load(2048, 2048, False, recorded), "cuda", 0) for recorded in (False, True))
    assert 1.9 * kept.activations < again.activations
    assert again.total - again.activations == kept.total - kept.activations
