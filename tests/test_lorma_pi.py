"""LoRMA_π against the paper's formula written out: rows turned one by one, and W′ made whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exact import Exact, draw
from merging import require_merged_computes
from same_tokens import IDS
from stirred import Stir
from test_lorma_replora import ALPHA, RANK, moved
from test_vectors import family  # noqa: F401
from torch.nn import functional as F

from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.base.weights import Dense
from edgelora.config import TrainConfig
from edgelora.peft.inject import attach
from edgelora.peft.lorma_pi import beyond_identity, fresh, turned_back
from edgelora.training.settle import settle
from edgelora.words import size


def turned(matrix):
    """I_π of the paper: row 0 by 0, row 1 by 1, and so on."""
    return torch.stack([torch.roll(row, i) for i, row in enumerate(matrix)])


def test_the_papers_example_comes_out_of_full_rank():
    """Ones in a column, of rank 1, are the identity once they are turned."""
    column = torch.zeros(3, 3)
    column[:, 0] = 1
    assert torch.equal(turned(column), torch.eye(3))
    a, b = torch.tensor([[1.0, 0, 0]]), torch.ones(3, 1)
    assert torch.equal(beyond_identity(a, b, 2.0, 0.0), 2 * torch.eye(3))
    assert torch.equal(turned_back(turned(torch.arange(9.0).view(3, 3))), torch.arange(9.0).view(3, 3))


def test_it_multiplies_the_weight_by_the_turned_product():
    weight, x = Exact(draw(7, 5)), draw(11, 5, seed=1).requires_grad_()
    linear = moved("lorma_pi", weight)
    a, b = linear.delta.lora_A, linear.delta.lora_B
    wanted = F.linear(x, ALPHA / RANK * turned(b @ a) @ weight.values)
    torch.testing.assert_close(linear(x), wanted, rtol=1e-6, atol=1e-6)  # its 1 is rounded as float32
    theirs = torch.autograd.grad(wanted.square().sum(), [x, a, b])
    torch.testing.assert_close(torch.autograd.grad(linear(x).square().sum(), [x, a, b]), theirs, rtol=1e-6, atol=1e-5)
    added = linear.delta.tensors()["delta"]
    torch.testing.assert_close(F.linear(x, weight.values + added), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", [32.0, 7.3, 0.1])
def test_it_begins_as_the_identity_whatever_the_scale(alpha):
    delta = fresh(Dense(draw(9, 5).float()), 6, alpha, torch.Generator().manual_seed(1))
    product = alpha / 6 * turned(delta.lora_B @ delta.lora_A)
    torch.testing.assert_close(product, torch.eye(9), rtol=0, atol=1e-6)
    assert not beyond_identity(delta.lora_A, delta.lora_B, delta.scale, delta.identity).any()
    x = draw(4, 5, seed=2).float()
    assert torch.equal(delta(x, delta.weight), F.linear(x, delta.weight.values))


def test_no_matrix_of_the_layer_is_kept_for_the_backward_pass():
    linear, kept = moved("lorma_pi", Exact(draw(7, 5))), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        linear(draw(11, 5, seed=1))
    assert sorted(kept) == [(RANK, 7), (7, RANK), (11, 7)]


def test_the_size_of_what_it_leaves_is_that_of_the_weights(tiny):
    base = open_base(tiny.path)
    plan = settle(TrainConfig(base=base.path, data="rows.jsonl", out="out", method="lorma_pi"), base, 10**10)
    numbers = sum(d_out * d_in for d_out, d_in in base.linears.values())
    assert plan.choices["size"].value == size(4 * numbers)


def test_merged_it_computes_the_same_in_llama_cpp(family, tmp_path):  # noqa: F811
    """Over a GGUF whose rotary rows lie in another order than those that were turned."""
    base = open_base(family("llama").gguf)
    decoder, adapter = Stir(rank=4, alpha=6.0, by=0.1).on(base, "lorma_pi", folder=tmp_path / "mine")
    live = decoder.logits(IDS)
    assert float((live - build_decoder(base).logits(IDS)).abs().max()) > 0.1
    require_merged_computes(base, tmp_path / "mine", IDS, live, atol=1e-4)
    attach(decoder, adapter)
    torch.testing.assert_close(decoder.logits(IDS), live, atol=1e-4, rtol=1e-5)
    assert all(np.linalg.matrix_rank(adapter.tensors[m]["delta"]) > 4 for m in adapter.linears)
