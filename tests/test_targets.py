"""Where an adapter goes and how strongly: PEFT's settings choose here what they choose in PEFT."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from same_tokens import IDS

from edgelora.architectures import ARCHITECTURES
from edgelora.architectures.layers import Layers
from edgelora.architectures.names import linear_modules
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.cli import run
from edgelora.config import TrainConfig
from edgelora.errors import ConfigError
from edgelora.peft.adapter import TENSORS, Adapter, read_adapter, write_adapter
from edgelora.peft.around import NOTHING
from edgelora.peft.inject import adapter_config, attach, collect, inject
from edgelora.peft.methods import METHODS
from edgelora.peft.strength import strengths
from edgelora.peft.targets import NAME, Placed, Where, by_pattern, placed, require_ranks, select, target_modules
from edgelora.training.adapter_footprint import adapter_numbers
from edgelora.training.base_footprint import Model

# PEFT 0.21 asks transformers 5.23 for an attribute it has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

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
    found = select(shapes, Where(**SETTINGS[case]))
    assert found == theirs
    assert 0 < len(found) < len(shapes)
    again = LoraConfig(target_modules=target_modules(found, shapes))
    assert [name for name in shapes if check_target_module_exists(again, name)] == found


def test_no_target_and_all_linear_are_all(shapes):
    assert select(shapes, Where()) == select(shapes, Where(("all-linear",))) == list(shapes)


def test_patterns_give_each_layer_its_own(shapes):
    where = Where(("q_proj", "up_proj"), rank_pattern={"layers.0.self_attn.q_proj": 2, "q_proj": 8},
                  alpha_pattern={r"layers\.\d+\.mlp\.up_proj": 3.0})  # fmt: skip
    assert placed(select(shapes, where), where, 4, 16.0) == {
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
        placed(select(shapes, Where(**settings)), Where(**settings), 4, 8.0)
    assert said in error.value.what
    assert fix in error.value.fix


def test_a_rank_beyond_the_matrix_is_refused(shapes):
    with pytest.raises(ConfigError) as error:
        require_ranks(placed(shapes, Where(), 200, 8.0), shapes)
    assert str(error.value).splitlines() == [
        "rank 200: model.layers.0.self_attn.k_proj is only 128 x 256, and so are 3 more",
        "  why: a change of such a matrix has no more than 128 directions",
        "  fix: take --rank 128 or less, or --rank-pattern k_proj=128",
    ]
    found = placed(shapes, Where(rank_pattern={"[kv]_proj": 128}), 200, 8.0)
    require_ranks(found, shapes)
    assert found["model.layers.0.self_attn.q_proj"].rank == 200


# -- as PEFT computes it --------------------------------------------------------------------------------------------

RANK, ALPHA = 4, 6.0
AS_PEFT = {
    "regex": {"target_modules": (r".*\.(q|v)_proj",)},
    "layers": {"target_modules": ("q_proj", "down_proj"), "layers_to_transform": (1,)},
    "ranks": {
        "exclude_modules": ("layers.0.mlp.up_proj",), "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
        "alpha_pattern": {r"layers\.\d+\.self_attn\.v_proj": 20.0},
    },
    "rslora": {"use_rslora": True, "rank_pattern": {"k_proj": 9}, "alpha_pattern": {"o_proj": 3.0}},
}  # fmt: skip


def config_of(settings):
    """The same as a LoraConfig."""
    settings = {"target_modules": ("all-linear",), **settings}
    listed = {name: value for name, value in settings.items() if isinstance(value, tuple)}
    texts = {name: value[0] for name, value in listed.items() if len(value) == 1 and not NAME.fullmatch(str(value[0]))}
    texts |= {"target_modules": "all-linear"} if settings["target_modules"] == ("all-linear",) else {}
    return LoraConfig(r=RANK, lora_alpha=ALPHA, **settings | {n: list(v) for n, v in listed.items()} | texts)


def stir(decoder):
    """Move everything that is trained away from its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_((torch.rand(parameter.shape, generator=generator) - 0.5) * 0.1)


@pytest.mark.parametrize("case", AS_PEFT)
def test_peft_with_the_same_settings_computes_the_same(tiny, transformers_model, tmp_path, case):
    decoder, where = build_decoder(open_base(tiny.path)), Where(**AS_PEFT[case])
    inject(decoder, "lora", RANK, ALPHA, 0, where)
    stir(decoder)
    config = adapter_config(decoder, "lora", RANK, ALPHA, str(tiny.path), where)
    write_adapter(tmp_path / "mine", Adapter(config, collect(decoder)))
    ours = decoder.logits(IDS)
    asked = get_peft_model(transformers_model(tiny), config_of(AS_PEFT[case])).eval()
    state = load_file(tmp_path / "mine" / TENSORS)
    assert {name: value.shape for name, value in get_peft_model_state_dict(asked).items()} == {
        name: value.shape for name, value in state.items()
    }
    set_peft_model_state_dict(asked, state)
    read = PeftModel.from_pretrained(transformers_model(tiny), tmp_path / "mine").eval()
    with torch.no_grad():
        for theirs in (asked, read):
            torch.testing.assert_close(ours, theirs(IDS[None]).logits[0], atol=1e-4, rtol=1e-5)
    attach(decoder, read_adapter(tmp_path / "mine", Layers(tiny.linears)))
    torch.testing.assert_close(decoder.logits(IDS), ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.ranked and row.around is NOTHING
                                    and row.peft_type == "LORA"])  # fmt: skip
def test_every_method_that_takes_them_leaves_as_what_it_is(tiny, tmp_path, method):
    """Whatever ranks, α and scales: the files compute what was trained."""
    base = open_base(tiny.path)
    decoder = build_decoder(base)
    where = Where(rank_pattern={"q_proj": 2, "down_proj": 8}, alpha_pattern={"q_proj": 30.0}, use_rslora=True)
    inject(decoder, method, RANK, ALPHA, 0, where)
    stir(decoder)
    ours = decoder.logits(IDS)
    config = adapter_config(decoder, method, RANK, ALPHA, "-", where)
    write_adapter(tmp_path / "mine", Adapter(config, collect(decoder)))
    attach(decoder, read_adapter(tmp_path / "mine", base.layers))
    torch.testing.assert_close(decoder.logits(IDS), ours, atol=1e-4, rtol=1e-5)


def test_what_a_method_cannot_take_is_refused():
    shapes = {"model.layers.0.self_attn.q_proj": (8, 8)}
    for method, where, said in (
        (
            "vera",
            Where(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 2}),
            "rank_pattern, alpha_pattern: nothing",
        ),
        ("adalora", Where(use_rslora=True), "use_rslora: nothing that --method adalora could use"),
    ):
        with pytest.raises(ConfigError, match=said):
            strengths(METHODS[method], shapes, where, 4, 8.0)


# -- in a run -------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n')
    return path


def test_a_run_takes_them_as_options(tiny, rows, tmp_path, capsys):
    settings = {
        "rank": 4, "alpha": 6, "target_modules": r".*\.(q|v)_proj", "exclude_modules": "layers.0.self_attn.q_proj",
        "rank_pattern": "v_proj=2", "alpha_pattern": "q_proj=3", "lora_dropout": 0.25,
    }  # fmt: skip
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    words = ["train", str(tiny.path), str(rows), "--out", str(tmp_path / "mine"), "--max-steps=2", "--use-rslora"]
    assert run([*words, *options]) == 0, capsys.readouterr().err
    adapter = read_adapter(tmp_path / "mine", Layers(tiny.linears))
    ranks = {module: len(parts["lora_A"]) for module, parts in adapter.tensors.items()}
    q, v = "model.layers.1.self_attn.q_proj", [f"model.layers.{i}.self_attn.v_proj" for i in range(2)]
    assert ranks == {q: 4, v[0]: 2, v[1]: 2}
    wanted = {"r": 4, "lora_alpha": 6, "use_rslora": True, "lora_dropout": 0.25, "alpha_pattern": {q: 3.0}}
    assert {name: adapter.config[name] for name in wanted} == wanted
    assert adapter.contract.training["rank_pattern"] == ["v_proj=2"]
    config = TrainConfig(base=tiny.path, data=rows, out="-", **settings)
    numbers = sum(part.size for parts in adapter.tensors.values() for part in parts.values())
    assert adapter_numbers(Model.of(open_base(tiny.path)), config) == numbers


REFUSED = {
    ("--target-modules", "q_prj"): "did you mean q_proj?",
    ("--rank-pattern", "q_proj=2.5"): "q_proj=2.5: a rank is a whole number",
    ("--rank-pattern", "q_proj"): "q_proj is no NAME=NUMBER, such as q_proj=4",
    ("--rank", "200"): "k_proj is only 128 x 256",
    ("--modules-to-save", "lm_haed"): "did you mean lm_head?",
    ("--bias", "all"): "bias all: no layer of this model has a bias",
    ("--bias", "all", "--method", "ia3"): "bias: nothing that --method ia3 could use",
}


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_a_run_refuses_what_cannot_be(tiny, rows, tmp_path, capsys, words):
    assert run(["train", str(tiny.path), str(rows), "--out", str(tmp_path / "mine"), *words]) == 1
    assert REFUSED[words] in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()
