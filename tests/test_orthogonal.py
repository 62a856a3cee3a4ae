"""A start orthogonal to earlier adapters (O-LoRA): what they look at, it does not see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import ROOT
from example_runs import example_rows
from safetensors.numpy import load_file
from stirred import Stir
from test_export import make_adapter, make_dora
from test_vectors import family  # noqa: F401

import edgelora
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.config import TrainConfig
from edgelora.errors import AdapterError, ConfigError
from edgelora.peft.adapter import TENSORS, read_adapter, write_adapter
from edgelora.peft.inject import inject
from edgelora.peft.methods import METHODS
from edgelora.peft.orthogonal import complement, start_orthogonally
from edgelora.peft.targets import Where
from edgelora.training.avoided import avoided

LAYER = "model.layers.1.self_attn.v_proj"


@pytest.fixture(scope="module")
def base(tiny):
    return open_base(tiny.path)


@pytest.fixture
def decoder(base):
    return build_decoder(base)


def starts(decoder):
    return {name: linear.delta.lora_A.detach().clone() for name, linear in decoder.linears.items()}


@pytest.mark.parametrize("method", ["lora", "rslora", "loraplus", "dora", "dylora"])
def test_its_rows_are_orthogonal_to_all_of_theirs_and_as_long_as_drawn(base, decoder, method):
    earlier = [make_adapter(base, rank=5, seed=1), make_adapter(base, rank=3, seed=2)]
    inject(decoder, method, 4, 8.0, seed=0)
    drawn, before = starts(decoder), decoder.logits(torch.arange(3, 20))
    start_orthogonally(decoder, earlier)
    for name, a in starts(decoder).items():
        assert not torch.equal(a, drawn[name])
        torch.testing.assert_close(a.norm(dim=1), drawn[name].norm(dim=1))
        for adapter in earlier:
            theirs = torch.from_numpy(adapter.pair(name).a)
            assert float((a @ theirs.T).abs().max()) < 1e-6
            assert float((drawn[name] @ theirs.T).abs().max()) > 1e-2
    assert torch.equal(decoder.logits(torch.arange(3, 20)), before)


def test_what_is_left_of_a_row_is_its_share_in_the_complement():
    a, earlier = torch.tensor([[3.0, 4.0, 12.0]]), torch.tensor([[0.0, 0.0, 2.0], [0.0, 0.0, -1.0]])
    torch.testing.assert_close(complement("x", a, earlier), torch.tensor([[3.0, 4.0, 0.0]]) * 13 / 5)


def test_rows_of_zeros_turn_nothing():
    a = torch.ones(1, 3)
    torch.testing.assert_close(complement("x", a, torch.zeros(2, 3)), a)


def test_only_layers_that_both_have_are_turned(base, decoder):
    earlier = make_adapter(base, seed=1)
    only = {name: parts for name, parts in earlier.tensors.items() if name == LAYER}
    inject(decoder, "lora", 4, 8.0, seed=0, targets=["v_proj"])
    drawn = decoder.linears["model.layers.0.self_attn.v_proj"].delta.lora_A.detach().clone()
    start_orthogonally(decoder, [type(earlier)(earlier.config, only)])
    assert torch.equal(decoder.linears["model.layers.0.self_attn.v_proj"].delta.lora_A, drawn)
    turned = decoder.linears[LAYER].delta.lora_A.detach()
    assert float((turned @ torch.from_numpy(earlier.pair(LAYER).a).T).abs().max()) < 1e-6


def test_a_run_starts_there_and_says_so(tiny, base, tmp_path):
    write_adapter(tmp_path / "earlier", make_adapter(base, seed=1))
    config = TrainConfig(
        base=tiny.path, data=example_rows(tmp_path / "rows.jsonl", 0, 4), out=tmp_path / "new",
        orthogonal_to=(tmp_path / "earlier",), rank=2, max_steps=1, learning_rate=1e-30, dtype="f32", device="cpu",
        target_modules=("v_proj",),
    )  # fmt: skip
    run = edgelora.train(config)
    assert run.choices["start"].value == "orthogonal to earlier"
    a = load_file(tmp_path / "new" / TENSORS)[f"base_model.model.{LAYER}.lora_A.weight"]
    theirs = read_adapter(tmp_path / "earlier", base.layers).pair(LAYER).a
    assert np.abs(a @ theirs.T).max() < 1e-6
    said = read_adapter(tmp_path / "new", base.layers).contract.training
    assert said["choices"]["start"]["value"] == "orthogonal to earlier"
    assert "orthogonal_to" not in said  # a path of this machine


def test_one_with_biases_norms_and_an_embedding_lends_its_directions_alone(family, tmp_path):  # noqa: F811
    base = open_base(family("qwen2").folder)
    where = Where(("q_proj",), bias="all", modules_to_save=("norm", "embed_tokens"))
    Stir(2, 2.0, by=0.2).on(base, "lora", where, tmp_path / "earlier")
    asked = TrainConfig(base=base.path, data="-", out=tmp_path / "new", orthogonal_to=(tmp_path / "earlier",))
    (earlier,) = avoided(asked, base)
    decoder = build_decoder(base)
    inject(decoder, "lora", 4, 8.0, seed=0)
    drawn = starts(decoder)
    start_orthogonally(decoder, [earlier])
    for name, a in starts(decoder).items():
        parts = earlier.tensors.get(name, {})
        if "lora_A" in parts:
            assert float((a @ torch.from_numpy(parts["lora_A"]).T).abs().max()) < 1e-6
        assert torch.equal(a, drawn[name]) == ("lora_A" not in parts)  # the biases of k and v look at nothing


@pytest.mark.parametrize(
    ("method", "where", "said"),
    [
        ("lora", Where(("q_proj",), modules_to_save=("down_proj",)), "down_proj: a layer that is saved whole leaves"),
        ("ia3", Where(), "what the IA3 makes of it is not B A"),
        ("layernorm", Where(), "LayerNorm tuning adapts no linear layer"),
    ],
    ids=["whole", "ia3", "layernorm"],
)
def test_what_has_no_directions_is_refused(base, decoder, tmp_path, method, where, said):
    Stir(2, 2.0, by=0.2).on(base, method, where, tmp_path / "earlier")
    asked = TrainConfig(base=base.path, data="-", out=tmp_path / "new", orthogonal_to=(tmp_path / "earlier",))
    inject(decoder, "lora", 4, 8.0, seed=0)
    with pytest.raises(AdapterError, match=said):
        start_orthogonally(decoder, avoided(asked, base))


def test_an_adapter_of_another_base_is_refused_before_anything_is_written(tiny, make_tiny, tmp_path):
    write_adapter(tmp_path / "other", make_adapter(open_base(make_tiny(seed=9).path)))
    config = TrainConfig(
        base=tiny.path, data=ROOT / "examples" / "home" / "train.jsonl", out=tmp_path / "new", device="cpu",
        orthogonal_to=(tmp_path / "other",),
    )  # fmt: skip
    with pytest.raises(AdapterError, match="does not belong to"):
        edgelora.train(config)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_another_base_and_what_does_not_fit_it_are_told_in_one_error(base, make_tiny, tmp_path):
    mine = make_adapter(base)
    mine.tensors[LAYER]["lora_B"][0, 0] = np.nan
    write_adapter(tmp_path / "earlier", mine)
    asked = TrainConfig(base=base.path, data="-", out=tmp_path / "new", orthogonal_to=(tmp_path / "earlier",))
    with pytest.raises(AdapterError) as error:
        avoided(asked, base)
    assert error.value.what == f"{tmp_path / 'earlier'}: {LAYER}: it holds NaN or infinite values"
    with pytest.raises(AdapterError) as error:
        avoided(asked, open_base(make_tiny(seed=9).path))
    assert error.value.what.startswith(f"{tmp_path / 'earlier'} does not belong to ")
    assert error.value.what.endswith(f"; {LAYER}: it holds NaN or infinite values")


def test_more_ranks_than_directions_are_left_are_refused(base, decoder):
    inject(decoder, "lora", 8, 8.0, seed=0)
    with pytest.raises(ConfigError) as e:
        start_orthogonally(decoder, [make_adapter(base, rank=250, seed=1)])
    assert str(e.value).splitlines() == [
        "--rank 8: the adapters of --orthogonal-to leave 6 of 256 directions in model.layers.0.self_attn.q_proj",
        "  why: the rows of A are to be orthogonal to all of theirs",
        "  fix: pass at most --rank 6, or name fewer adapters",
    ]


NAMED = ("lora", "rslora", "loraplus", "dora", "dylora", "alora", "longlora", "lors", "molora")


@pytest.mark.parametrize("method", [name for name in METHODS if name != "loftq"])  # which needs its original
def test_a_method_without_a_random_a_is_refused_and_told_who_has_one(base, decoder, method):
    inject(decoder, method, 4, 8.0, seed=0, targets=Where(token_indices=(5,) if METHODS[method].rows else ()))
    earlier = [make_adapter(base, seed=1)]
    start_orthogonally(decoder, [])  # whatever the method: to nothing
    if method in NAMED:
        start_orthogonally(decoder, earlier)
        return
    with pytest.raises(ConfigError, match="does not start with a random A") as refused:
        start_orthogonally(decoder, earlier)
    assert all(name in refused.value.fix for name in NAMED)


def test_a_dora_leaves_nothing(base, decoder):
    inject(decoder, "lora", 4, 8.0, seed=0)
    with pytest.raises(AdapterError, match="a DoRA leaves nothing"):
        start_orthogonally(decoder, [make_dora(base)])
