"""A LoRA with more ranks than a matrix has directions: read, told of, and brought back; in training it is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_export import make_adapter

from converters.adapter_to_gguf import write_adapter_gguf
from converters.exit_words import note_of_ranks
from converters.svd import nearest_lora
from edgelora.base.model import open_base
from edgelora.cli import run
from edgelora.errors import ConfigError
from edgelora.peft.adapter import write_adapter
from edgelora.peft.methods import METHODS
from edgelora.peft.strength import strengths
from edgelora.peft.targets import Where
from edgelora.pipeline.exit_plan import plan

RANK = 300  # of the tiny model k and v have 128 directions, all others 256
NOTE = (
    "rank 300 is more than the 128 that {} can hold, and so with 13 more: it computes the same as with fewer, which "
    "`edgelora export --svd-rank 256` writes"
)


@pytest.fixture(scope="module")
def base(tiny):
    return open_base(tiny.path)


@pytest.fixture(scope="module")
def large(base):
    return make_adapter(base, rank=RANK)


def test_it_is_said_of_the_worst_and_only_where_it_is_so():
    pairs = {"a": (64, 8, 8), "b": (8, 64, 16), "c": (4, 64, 16)}
    assert note_of_ranks({"a": pairs["a"]}) == ""
    assert note_of_ranks({name: pairs[name] for name in "ab"}) == (
        "rank 16 is more than the 8 that b can hold: it computes the same as with fewer, which `edgelora export "
        "--svd-rank 8` writes"
    )
    assert note_of_ranks(pairs).startswith("rank 16 is more than the 4 that c can hold, and so with 1 more: ")


def test_a_folder_is_read_and_its_plan_says_it_once(base, large, tmp_path):
    write_adapter(tmp_path / "mine", large)
    found = plan(base.path, tmp_path / "mine")
    assert (found.door, found.exact) == ("adapter", True)
    assert [note for note in found.notes if "can hold" in note] == [NOTE.format("blk.0.attn_k.weight")]


def test_a_gguf_is_read_and_its_import_says_it_once(base, large, tmp_path, capsys):
    write_adapter_gguf(tmp_path / "large.gguf", large, base, "large", "F32")
    words = ["import", str(base.path), str(tmp_path / "large.gguf"), "--out", str(tmp_path / "mine"), "--json"]
    assert run(words) == 0
    told = capsys.readouterr()
    note = NOTE.format("model.layers.0.self_attn.k_proj")
    assert json.loads(told.out)["notes"] == [note]
    assert told.err.count("can hold") == 1


def test_the_nearest_lora_is_the_same_with_as_many_ranks_as_there_are_directions(base, large):
    found = nearest_lora(base, large, 256)
    assert found.whole < 1e-5
    for module in large.linears:
        pair, own = found.adapter.pair(module), large.pair(module)
        assert pair.rank == min(base.linears[module])
        np.testing.assert_allclose(pair.b @ pair.a, own.b @ own.a, atol=1e-5)


RANKED = {name for name, row in METHODS.items() if row.linears and row.ranked and not row.rows and row.before is None}
FREE = {"vera", "galore", "houlsby", "molora", "lorma_pi"}  # shared, cut, behind a layer, by token, permuted


@pytest.mark.parametrize("method", sorted(RANKED - FREE))
def test_training_refuses_it_wherever_b_a_is_as_large_as_the_weight(base, method):
    with pytest.raises(ConfigError) as error:
        strengths(METHODS[method], base.linears, Where(), RANK, 8.0)
    assert error.value.what.startswith("rank 300: model.layers.0.self_attn.k_proj is only 128 x 256")
    by_layer = method not in ("dylora", "adalora", "glora", "lors")
    assert error.value.fix == "take --rank 128 or less" + ", or --rank-pattern k_proj=128" * by_layer


@pytest.mark.parametrize("method", sorted(FREE))
def test_ranks_of_another_kind_may_be_larger(base, method):
    found = strengths(METHODS[method], base.linears, Where(), RANK, 8.0)
    assert {place.rank for place in found.values()} == {RANK}
