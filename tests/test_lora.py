"""LoRA over frozen weights, against PEFT in both directions, and adapter files that must be refused."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from same_tokens import IDS

from edgelora.architectures.layers import Layers
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.base.weights import Dense
from edgelora.errors import AdapterError
from edgelora.peft.adapter import CONFIG, PREFIX, TENSORS, Adapter, read_adapter, write_adapter
from edgelora.peft.inject import adapter_config, attach, collect, inject, without_adapter
from edgelora.peft.lora_settings import BEYOND_LORA

# PEFT 0.21 asks transformers 5.23 for an attribute it has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def base(tiny):
    return open_base(tiny.path)


@pytest.fixture
def decoder(base):
    return build_decoder(base)


def fit(decoder, parameters, steps=4):
    """A few steps on IDS, so that the adapter on `decoder` does something."""
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    for _ in range(steps):
        hidden = decoder(IDS, torch.arange(len(IDS)), [0, len(IDS)])
        decoder.nll(hidden[:-1], IDS[1:]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """(folder, logits): an adapter trained for four steps, strong enough to see."""
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    decoder = build_decoder(base)
    fit(decoder, inject(decoder, "lora", rank=4, alpha=12, seed=0))
    write_adapter(folder, Adapter(adapter_config(decoder, "lora", 4, 12, str(base.path)), collect(decoder)))
    return folder, decoder.logits(IDS)


# -- on a built model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 4, 128])
def test_a_fresh_pair_has_the_asked_rank_and_pefts_bounds(decoder, rank):
    inject(decoder, "lora", rank=rank, alpha=8, seed=0)
    delta = decoder.linears[DOWN1].delta
    a, b = delta.tensors()["lora_A"], delta.tensors()["lora_B"]
    assert (a.shape, b.shape) == ((rank, 512), (256, rank))
    assert not b.any()
    bound = 512**-0.5  # Kaiming uniform with a = √5: √(6 / (1 + 5) / d_in)
    assert 0.9 * bound < float(a.abs().max()) <= bound
    assert delta.scale == 8 / rank


def test_attaching_nothing_takes_the_adapter_off(base, decoder, trained):
    before = decoder.logits(IDS)
    attach(decoder, read_adapter(trained[0], base.layers))
    assert not torch.equal(decoder.logits(IDS), before)
    attach(decoder, None)
    assert torch.equal(decoder.logits(IDS), before)


def test_without_the_adapter_it_is_the_base_and_then_the_adapter_again(base, decoder, trained):
    before = decoder.logits(IDS)
    attach(decoder, read_adapter(trained[0], base.layers))
    adapted, parameters = decoder.logits(IDS), list(decoder.parameters())
    with without_adapter(decoder):
        assert torch.equal(decoder.logits(IDS), before)
        assert list(decoder.parameters()) == []
    with pytest.raises(IndexError), without_adapter(decoder):
        decoder.logits(IDS + 10**6)
    assert torch.equal(decoder.logits(IDS), adapted)
    assert all(a is b for a, b in zip(parameters, decoder.parameters(), strict=True))


def test_a_trained_adapter_computes_the_same_when_read_again(base, decoder, trained):
    folder, logits = trained
    attach(decoder, read_adapter(folder, base.layers))
    torch.testing.assert_close(decoder.logits(IDS), logits, atol=1e-5, rtol=0)


def test_merged_is_unmerged(base, decoder, trained):
    adapter = read_adapter(trained[0], base.layers)
    attach(decoder, adapter)
    live = decoder.logits(IDS)
    attach(decoder, None)
    for name, pair in adapter.pairs().items():
        linear = decoder.linears[name]
        linear.weight = Dense(linear.weight.dequantize() + torch.from_numpy(pair.b @ pair.a))
    torch.testing.assert_close(decoder.logits(IDS), live, atol=1e-5, rtol=1e-5)


# -- PEFT reads what edgelora wrote -------------------------------------------------------------------------------


def test_peft_loads_a_trained_adapter(tiny, transformers_model, trained):
    folder, logits = trained
    theirs = PeftModel.from_pretrained(transformers_model(tiny), folder)
    state = theirs.state_dict()
    ours = load_file(folder / TENSORS)
    assert len(ours) == 2 * 2 * len(LINEARS)  # A and B of each linear in two layers
    for name, value in ours.items():
        np.testing.assert_array_equal(state[name.replace(".weight", ".default.weight")].numpy(), value)
    torch.testing.assert_close(logits, theirs(IDS[None]).logits[0].detach(), atol=1e-4, rtol=0)


def test_the_files_are_those_of_peft(trained):
    folder, _ = trained
    assert sorted(f.name for f in folder.iterdir()) == [CONFIG, TENSORS]
    names = load_file(folder / TENSORS)
    assert f"base_model.model.{Q0}.lora_A.weight" in names
    config = json.loads((folder / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 12)
    assert sorted(config["target_modules"]) == sorted(LINEARS)


# -- edgelora reads what PEFT wrote -------------------------------------------------------------------------------

PEFT_CONFIGS = {
    "plain": {},
    "few modules": {"target_modules": ["q_proj", "v_proj"]},
    "rslora": {"use_rslora": True},
    "alpha pattern": {"alpha_pattern": {"q_proj": 64, "layers.1.mlp.down_proj": 1}},
    "alpha pattern, a regular expression": {"alpha_pattern": {r"layers\.1\..*_proj": 64, "^model.layers.0.mlp.*": 1}},
    "rank pattern": {"rank_pattern": {"q_proj": 2, "layers.0.mlp.up_proj": 7}},
    "both patterns, rslora": {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 5}, "use_rslora": True},
}


def made_by_peft(tiny, transformers_model, folder, dtype=torch.float32, **settings):
    """Save an adapter with random A and B of type `dtype` through PEFT itself; its logits in float32."""
    config = {"r": 4, "lora_alpha": 12, "target_modules": LINEARS, "init_lora_weights": False} | settings
    torch.manual_seed(0)
    model = get_peft_model(transformers_model(tiny), LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    adapted = [p for p in model.parameters() if p.requires_grad]
    for p in adapted:
        p.data = (p.data * 0.3).to(dtype)  # PEFT's random B is strong enough to amplify rounding
    model.save_pretrained(folder)
    for p in adapted:
        p.data = p.data.to(torch.float32)
    return model(IDS[None]).logits[0].detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS)
def test_an_adapter_of_peft_computes_the_same_here(tiny, transformers_model, decoder, tmp_path, settings, dtype):
    theirs = made_by_peft(tiny, transformers_model, tmp_path, dtype, **settings)
    before = decoder.logits(IDS)
    attach(decoder, read_adapter(tmp_path, Layers(tiny.linears)))
    ours = decoder.logits(IDS)
    assert float((ours - before).abs().max()) > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_scale_stands_in_b(tiny, transformers_model, tmp_path):
    made_by_peft(tiny, transformers_model, tmp_path, use_rslora=True, alpha_pattern={"q_proj": 64})
    adapter = read_adapter(tmp_path, Layers(tiny.linears))
    pairs = adapter.pairs()
    for module, alpha in ((Q0, 64), (DOWN1, 12)):
        stored = adapter.tensors[module]
        assert pairs[module].rank == 4
        np.testing.assert_array_equal(pairs[module].a, stored["lora_A"])
        np.testing.assert_allclose(pairs[module].b, stored["lora_B"] * alpha / 2, rtol=1e-6)  # √4


# Each of these stores more than A and B, so that the pairs alone are not the adapter.
NOT_PLAIN = {
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [3]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
}


@pytest.mark.parametrize("settings", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_an_adapter_that_is_more_than_a_and_b_is_refused(tiny, transformers_model, tmp_path, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, on tied weights and saved embeddings
        made_by_peft(tiny, transformers_model, tmp_path, **settings)
    with pytest.raises(AdapterError):
        read_adapter(tmp_path, Layers(tiny.linears))


# -- faults of a file ---------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(trained, tmp_path, tiny):
    """`damaged(change)`: what is said of the trained adapter after `change(config, tensors)` has edited both dicts."""

    def make(change):
        config, tensors = json.loads((trained[0] / CONFIG).read_text()), load_file(trained[0] / TENSORS)
        change(config, tensors)
        (tmp_path / CONFIG).write_text(json.dumps(config))
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, tmp_path / TENSORS)
        with pytest.raises(AdapterError) as e:
            read_adapter(tmp_path, Layers(tiny.linears)).pairs()
        assert e.value.why
        assert e.value.fix
        return e.value.what.removeprefix(f"{tmp_path}: ")

    return make


def test_all_faults_of_an_adapter_are_named_at_once(damaged):
    a, b = f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{DOWN1}.lora_B.weight"

    def change(config, tensors):
        config["modules_to_save"] = ["lm_head"]
        tensors[a] = tensors[a].T
        del tensors[b]
        tensors[f"{PREFIX}model.layers.0.mlp.up_proj.lora_A.weight"][0, 0] = np.nan
        tensors[f"{PREFIX}model.layers.0.mlp.gate_proj.lora_B.weight"][0, 0] = np.inf
        tensors[f"{PREFIX}model.layers.7.mlp.up_proj.lora_A.weight"] = np.ones((4, 256), np.float32)
        tensors["lm_head.weight"] = np.ones((2, 2), np.float32)

    assert sorted(damaged(change).split("; ")) == [
        "lm_head.weight is no part of a LoRA with whole tensors",
        "model.layers.0.mlp.gate_proj: it holds NaN or infinite values",
        "model.layers.0.mlp.up_proj: it holds NaN or infinite values",
        f"{Q0}: lora_A is (256, 4), expected (r, 256)",
        f"{DOWN1}: lora_B is missing",
        "model.layers.7.mlp.up_proj is no linear layer of this model",
    ]


def test_more_than_eight_faults_are_counted(damaged):
    def change(_, tensors):
        for name in [name for name in tensors if "lora_B" in name]:
            del tensors[name]

    assert damaged(change).endswith(" and 6 more")  # 14 modules, 8 shown


@pytest.mark.parametrize("setting", BEYOND_LORA)
def test_a_setting_under_which_a_and_b_are_not_the_adapter_is_refused(damaged, setting):
    said = f"{setting} is set: {BEYOND_LORA[setting]}"
    assert damaged(lambda config, _: config.update({setting: {"some": "thing"}})) == said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 8}, f"{Q0}: its rank is 4, and its settings say 8"),
        ({"rank_pattern": {"q_proj": 2}}, f"{Q0}: its rank is 4, and its settings say 2"),
        ({"rank_pattern": {"(q_proj": 2}}, "rank_pattern: (q_proj is no regular expression"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is no table of names and numbers"),
    ],
    ids=str,
)
def test_a_rank_that_is_not_that_of_its_settings_is_refused(damaged, settings, said):
    """PEFT loads no such file; with α over either rank it might be another adapter."""
    assert said in damaged(lambda config, _: config.update(settings))


def test_an_adapter_of_another_kind_is_refused(damaged):
    said = damaged(lambda config, _: config.update(peft_type="OFT"))
    assert said == f"{CONFIG} is that of an adapter of the kind OFT, which is not read here"


# Plain A and B, over another base than the file's: PEFT takes B₀A₀ off the weights (PiSSA, OLoRA), or changes them.
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq"])
def test_a_start_that_changes_the_base_is_refused(damaged, start):
    assert "init_lora_weights" in damaged(lambda config, _: config.update(init_lora_weights=start))


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_a_start_that_leaves_the_base_alone_is_welcome(trained, tmp_path, tiny, start):
    config = json.loads((trained[0] / CONFIG).read_text()) | {"init_lora_weights": start}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    save_file(load_file(trained[0] / TENSORS), tmp_path / TENSORS)
    assert len(read_adapter(tmp_path, Layers(tiny.linears)).pairs()) == 2 * len(LINEARS)


def test_an_adapter_without_tensors_is_refused(damaged):
    assert damaged(lambda _, tensors: tensors.clear()) == "it holds no LoRA tensors"


@pytest.mark.parametrize("alpha", [None, "16", math.nan, True])
def test_an_alpha_that_is_no_number_is_refused(damaged, alpha):
    assert damaged(lambda config, _: config.update(lora_alpha=alpha)).startswith("lora_alpha is ")


@pytest.mark.parametrize(
    "patterns", [{"q_proj": "16"}, {"q_proj": None}, {"q_proj": float("nan")}, ["q_proj"]], ids=str
)
def test_an_alpha_pattern_that_is_no_number_is_refused(damaged, patterns):
    assert "alpha_pattern" in damaged(lambda config, _: config.update(alpha_pattern=patterns))


def test_a_folder_without_an_adapter_is_refused(tmp_path, tiny):
    with pytest.raises(AdapterError) as e:
        read_adapter(tmp_path, Layers(tiny.linears))
    assert e.value.what == f"{tmp_path}: no adapter here"
    assert CONFIG in e.value.why
    assert "--out" in e.value.fix
    with pytest.raises(AdapterError, match="no adapter here") as e:
        read_adapter(tiny.path, Layers(tiny.linears))
    assert "`edgelora import BASE FILE --out FOLDER`" in e.value.fix


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "nonsense"], ids=["empty", "open", "deep", "text"])
def test_a_config_that_is_no_json_is_refused(tmp_path, tiny, text):
    (tmp_path / CONFIG).write_text(text)
    (tmp_path / TENSORS).write_bytes(b"")
    with pytest.raises(AdapterError, match="not a usable JSON file"):
        read_adapter(tmp_path, Layers(tiny.linears))


def test_a_config_that_is_not_utf_8_is_refused(tmp_path, tiny):
    (tmp_path / CONFIG).write_bytes(b"\xff{}")
    (tmp_path / TENSORS).write_bytes(b"")
    with pytest.raises(AdapterError, match="not a usable JSON file"):
        read_adapter(tmp_path, Layers(tiny.linears))
