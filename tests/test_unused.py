"""A setting of the step that the chosen optimizer or schedule does not read is refused."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from edgelora.base.model import open_base
from edgelora.config import Optimizer, Schedule, TrainConfig
from edgelora.errors import ConfigError
from edgelora.training import whole
from edgelora.training.optim import build_optimizer
from edgelora.training.settle import settle
from edgelora.training.unused import OF_A_CHOICE, refuse_unused

VALUES = {"optimizer": get_args(Optimizer), "schedule": get_args(Schedule)}
GIVEN = {"beta1": 0.8, "beta2": 0.95, "decay_share": 0.5}
CASES = [(name, chooser, value) for name, (chooser, _, _) in OF_A_CHOICE.items() for value in VALUES[chooser]]


def config_of(**settings):
    return TrainConfig(base="-", data="-", out="-", **settings)


@pytest.mark.parametrize(("name", "chooser", "value"), CASES)
def test_what_is_not_read_is_refused_and_what_is_read_is_not(name, chooser, value):
    config = config_of(**{name: GIVEN[name], chooser: value})
    _, users, why = OF_A_CHOICE[name]
    if value in users:
        refuse_unused(config)
        return
    with pytest.raises(ConfigError) as fault:
        refuse_unused(config)
    assert str(fault.value).splitlines() == [
        f"--{name.replace('_', '-')} {GIVEN[name]:g} with --{chooser} {value}",
        f"  why: {why}",
        f"  fix: leave it out, or take --{chooser} {', '.join(users)}",
    ]


@pytest.mark.parametrize(("name", "chooser", "value"), CASES)
def test_one_that_is_as_it_would_be_passes(name, chooser, value):
    """A file that `--print-config` wrote says all of them."""
    refuse_unused(config_of(**{name: TrainConfig.model_fields[name].default, chooser: value}))


@pytest.mark.parametrize("name", [name for name in get_args(Optimizer) if name != "adamw8bit"])
def test_the_betas_are_read_by_the_optimizers_that_are_said_to(name):
    parameters = [("q.delta.lora_A", torch.nn.Parameter(torch.ones(2, 3)))]
    groups = build_optimizer(parameters, config_of(optimizer=name, learning_rate=0.1, beta1=0.8)).param_groups
    assert [group.get("betas", (None,))[0] == 0.8 for group in groups] == [name in OF_A_CHOICE["beta1"][1]]


def test_nor_is_one_passed_over_where_the_optimizer_is_chosen(tiny, monkeypatch):
    """Adafactor, for want of memory."""
    monkeypatch.setattr(whole, "MOMENTS_SHARE", 0.0)
    asked = {"base": tiny.path, "method": "full", "base_dtype": "f32"}
    base = open_base(tiny.path)
    assert settle(TrainConfig(data="-", out="-", **asked), base).config.optimizer == "adafactor"
    with pytest.raises(ConfigError, match=r"--beta1 0\.8 with --optimizer adafactor"):
        settle(TrainConfig(data="-", out="-", **asked, beta1=0.8), base)
