"""Where an adapter goes and how strongly: PEFT's settings choose here what they choose in PEFT."""

from __future__ import annotations

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from edgelora.architectures import ARCHITECTURES
from edgelora.architectures.names import linear_modules
from edgelora.errors import ConfigError
from edgelora.peft.targets import Placed, Where, by_pattern, chosen, placed, target_modules

SETTINGS = {
    "names": {"target_modules": ("q_proj", "down_proj")},
    "paths": {"target_modules": ("self_attn.q_proj", "model.layers.1.mlp.up_proj")},
    "regex": {"target_modules": (r".*layers\.1\..*\.(q|v)_proj",)},
    "one end": {"target_modules": ("v_proj",)},
    "without": {"target_modules": ("q_proj", "v_proj"), "exclude_modules": ("layers.0.self_attn.q_proj",)},
    "without regex": {"target_modules": ("q_proj", "v_proj"), "exclude_modules": (r".*\.0\..*",)},
    "layers": {"target_modules": ("q_proj", "o_proj"), "layers_to_transform": (1,)},
    "a path beside layers": {
        "target_modules": ("o_proj", "model.layers.0.self_attn.q_proj"), "layers_to_transform": (1,),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def shapes(tiny):
    return linear_modules(ARCHITECTURES["llama"], tiny.config)


def as_peft(settings):
    """PEFT takes a text as a regular expression, and a list as ends of names."""
    return {
        name: value[0] if name != "layers_to_transform" and len(value) == 1 and "*" in value[0] else list(value)
        for name, value in settings.items()
    }


@pytest.mark.parametrize("case", SETTINGS)
def test_peft_chooses_the_same_layers(shapes, case):
    config = LoraConfig(**as_peft(SETTINGS[case]))
    theirs = [name for name in shapes if check_target_module_exists(config, name) in (True,)
              or getattr(check_target_module_exists(config, name), "string", None)]  # fmt: skip
    found = chosen(shapes, Where(**SETTINGS[case]))
    assert found == theirs
    assert 0 < len(found) < len(shapes)
    again = LoraConfig(target_modules=target_modules(found, shapes))
    assert [name for name in shapes if check_target_module_exists(again, name)] == found


def test_no_target_and_all_linear_are_all(shapes):
    assert chosen(shapes, Where()) == chosen(shapes, Where(("all-linear",))) == list(shapes)


def test_patterns_give_each_layer_its_own(shapes):
    where = Where(("q_proj", "up_proj"), rank_pattern={"layers.0.self_attn.q_proj": 2, "q_proj": 8},
                  alpha_pattern={r"layers\.\d+\.mlp\.up_proj": 3.0})  # fmt: skip
    assert placed(shapes, where, 4, 16.0) == {
        "model.layers.0.self_attn.q_proj": Placed(2, 16.0), "model.layers.0.mlp.up_proj": Placed(4, 3.0),
        "model.layers.1.self_attn.q_proj": Placed(8, 16.0), "model.layers.1.mlp.up_proj": Placed(4, 3.0),
    }  # fmt: skip
    assert by_pattern({"proj": 1}, "model.layers.0.self_attn.q_proj", 0) == 0  # a whole part of the path


FAULTS = {
    "misspelt": ({"target_modules": ("q_prj", "down_proj", "gate")},
                 "target_modules: no linear layer of this model is named q_prj, gate", "did you mean q_proj"),
    "several": ({"target_modules": ("q_prj",), "exclude_modules": ("norm",), "layers_to_transform": (7,)},
                "named q_prj; exclude_modules: no linear layer of this model is named norm; layers_to_transform: 7, "
                "and this model's are 0 to 1", "q_proj"),
    "no regex": ({"target_modules": ("(q_proj",)}, "target_modules: (q_proj is no regular expression", ""),
    "regex of nothing": ({"target_modules": ("(q|k)_proj",)}, "(q|k)_proj fits the whole name of no linear layer", ""),
    "nothing left": ({"target_modules": ("q_proj",), "exclude_modules": ("self_attn.q_proj",)}, "leave none", ""),
    "layers of a regex": ({"target_modules": (".*q_proj",), "layers_to_transform": (0,)}, "say the layers in that", ""),
    "pattern of nothing": ({"target_modules": ("q_proj",), "rank_pattern": {"k_proj": 4}},
                           "rank_pattern: k_proj fits no layer that is adapted", ""),
    "pattern": ({"alpha_pattern": {"(k_proj": 4.0}}, "(k_proj is no regular expression", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_every_fault_is_told_with_the_nearest_name(shapes, case):
    settings, said, fix = FAULTS[case]
    with pytest.raises(ConfigError) as error:
        placed(shapes, Where(**settings), 4, 8.0)
    assert said in error.value.what
    assert fix in error.value.fix


def test_a_rank_beyond_the_matrix_is_refused(shapes):
    with pytest.raises(ConfigError) as error:
        placed(shapes, Where(), 200, 8.0)
    assert str(error.value).splitlines() == [
        "rank 200: model.layers.0.self_attn.k_proj is only 128 x 256, and 3 layers beside it are too small",
        "  why: a change of such a matrix has no more than 128 directions",
        "  fix: take --rank 128 or less, or --rank-pattern k_proj=128",
    ]
    assert (
        placed(shapes, Where(rank_pattern={"[kv]_proj": 128}), 200, 8.0)["model.layers.0.self_attn.q_proj"].rank == 200
    )
