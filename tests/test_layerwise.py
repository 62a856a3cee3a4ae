"""A layer at a time gives what the whole decoder gives, of every kind of layer, and never holds the whole model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type
from test_architectures import CASES, TEMPLATE, seeded
from test_export import make_adapter, make_dora

from edgelora.base.decoder import build_decoder
from edgelora.base.head import Head
from edgelora.base.layerwise import hidden_states
from edgelora.base.model import Base, open_base
from edgelora.data.encode import Example
from edgelora.data.pack import Batch, pack
from edgelora.peft.blend import blend, blend_layers

# every norm, gate, rotation, window and mixture that a layer can have
KINDS = ("llama-biased", "gemma2", "gemma3_text", "phi3-long", "smollm3", "olmo2", "granite", "qwen3_moe")


@pytest.fixture
def saved(tmp_path, vocabulary, write_tokenizer) -> Callable[[str], Base]:
    """`saved(case)`: transformers' seeded model as a checkpoint."""

    def make(name: str) -> Base:
        seeded(CASES[name]).save_pretrained(tmp_path)
        write_tokenizer(tmp_path, vocabulary, TEMPLATE)
        return open_base(tmp_path)

    return make


def batches() -> list[Batch]:
    """Two packed rows; the first with a beginning that its three segments share."""
    draw = np.random.default_rng(0)
    start = draw.integers(3, 30, 9)
    rows = [np.concatenate([start, draw.integers(3, 30, n)]) for n in (5, 30, 11)]
    groups = [rows, [draw.integers(3, 30, 20)]]
    return [pack([Example(row, np.arange(len(row)) > 12) for row in group]) for group in groups]


def in_one_piece(base: Base, batch: Batch, adapters=()) -> tuple[torch.Tensor, torch.Tensor]:
    decoder = build_decoder(base)
    blend(decoder, adapters)
    ids, positions = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.positions)
    with torch.no_grad():
        hidden = decoder(ids, positions, list(batch.segment_starts), batch.prefix)
    return hidden, decoder.logits_of(hidden)


@pytest.mark.parametrize("name", KINDS)
def test_the_states_are_those_of_the_decoder(saved, name):
    base, rows = saved(name), batches()
    found = hidden_states(base, rows)
    for states, batch in zip(found, rows, strict=True):
        hidden, logits = in_one_piece(base, batch)
        np.testing.assert_array_equal(states, hidden.numpy())
        np.testing.assert_allclose(Head(base).logits(states), logits.numpy(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [Type.F16, Type.Q4_K], ids=lambda kind: kind.name)
def test_a_gguf_with_adapters(make_tiny, kind):
    base, (batch, _) = open_base(make_tiny(kind).path), batches()
    adapters = [(make_adapter(base, seed=1), 0.5), (make_dora(base), 1.0), (make_adapter(base, seed=2), -2.0)]
    (found,) = hidden_states(base, [batch], partial(blend_layers, adapters=adapters))
    hidden, logits = in_one_piece(base, batch, adapters)
    np.testing.assert_array_equal(found, hidden.numpy())
    np.testing.assert_allclose(Head(base).logits(found), logits.numpy(), atol=1e-4, rtol=1e-5)
    assert np.abs(found - hidden_states(base, [batch])[0]).max() > 0.1


def test_a_layer_goes_before_the_next_one_comes(make_tiny, monkeypatch):
    base, (batch, _) = open_base(make_tiny(Type.Q8_0).path), batches()
    seen: list[str] = []
    for what in ("matrix", "forget"):
        real = getattr(base.tensors, what)

        def noted(name: str, what: str = what, real: Callable[[str], object] = real) -> object:
            seen.append(f"{what} {name}")
            return real(name)

        monkeypatch.setattr(base.tensors, what, noted)
    hidden_states(base, [batch])
    alive: set[str] = set()
    for word in seen:
        what, name = word.split()
        alive = alive | {name} if what == "matrix" else alive - {name}
        assert len({name.split(".")[2] for name in alive}) <= 1, word
    assert alive == set()
    assert len([word for word in seen if word.startswith("matrix")]) == 1 + len(base.linears)
