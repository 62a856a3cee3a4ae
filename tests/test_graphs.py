"""Rows in the shapes of recorded passes have the gradients of rows as they are. CUDA itself: tests/test_cuda.py.

Without a card nothing is recorded here: a pass is run anew where a graph would be repeated, over the same memory.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter

import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type
from packed_rows import adapted, backward
from test_vectors import family  # noqa: F401

from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.nn import compiled, flash, gpu_attention, graphs
from edgelora.nn.graphs import MOST, OFTEN, Graphs, Recorded, stamp_of
from edgelora.nn.linear import Linear
from edgelora.nn.shapes import Shape
from edgelora.peft import dropout
from edgelora.peft.inject import inject
from edgelora.peft.methods import METHODS
from edgelora.peft.targets import Where
from edgelora.training.optim import clip

STEP = 16  # of rows of up to 256 tokens
ROWS = [([50], 0), ([53], 0), ([20, 31], 0), ([7, 20, 1], 9), ([8, 19, 3], 9), ([55], 0)]


class ByPlaces:
    """Attention as FlashAttention is told of segments: where their queries and keys begin, and which rows keys are."""

    def __init__(self, q, k, v, borders, prefix, how):
        is_there = isinstance(borders, gpu_attention.Borders)
        self.places = borders.places if is_there else gpu_attention.segments(tuple(borders), prefix, q.device)
        self.tensors, self.how = (q, k, v), how

    def _out(self, q, k, v):
        p, group, parts = self.places, q.shape[1] // k.shape[1], []
        k, v = ((x if p.rows is None else x[p.rows]).repeat_interleave(group, 1) for x in (k, v))
        queries, keys = p.queries.tolist(), p.keys.tolist()
        assert queries[-1] == len(q)
        assert keys[-1] == len(k)
        for (a, b), (c, d) in zip(itertools.pairwise(queries), itertools.pairwise(keys), strict=True):
            assert b - a <= p.longest_query
            assert d - c <= p.longest_key
            scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * self.how.scale
            hidden = torch.ones(b - a, d - c, dtype=torch.bool).triu(d - c - (b - a) + 1)
            parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v[c:d]))
        return torch.cat(parts)

    def forward(self):
        with torch.no_grad():
            return self._out(*self.tensors), torch.zeros(1)

    def backward(self, _out, _lse, d_out):
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in self.tensors]
            return torch.autograd.grad(self._out(*inputs), inputs, d_out)


@pytest.fixture(autouse=True)
def by_places(monkeypatch):
    """Attention by the places of segments, and nothing recorded."""
    monkeypatch.setattr(compiled, "usable", lambda *_: False)
    monkeypatch.setattr(gpu_attention, "usable", lambda *_: True)
    monkeypatch.setattr(gpu_attention, "Problem", ByPlaces)
    monkeypatch.setattr(flash, "Problem", ByPlaces)
    monkeypatch.setattr(Recorded, "record", lambda *_: "")


def with_graphs(decoder):
    decoder.graphs = Graphs(
        decoder._through, decoder.model.layers, torch.device("cpu"), lends=False, longest_row=16 * STEP
    )
    return decoder


def assert_same_steps(one, two, rows, at_once=3):
    for step in range(0, len(rows), at_once):
        for i, row in enumerate(rows[step : step + at_once]):
            a, b = (backward(decoder, step + i, *row) for decoder in (one, two))
            torch.testing.assert_close(b, a, rtol=1e-5, atol=0)
        norms = [clip(list(decoder.parameters()), 1.0) for decoder in (one, two)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-5)
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-7)
            a.grad = b.grad = None


def row_of(lengths, prefix):
    starts = [*itertools.accumulate(lengths, initial=prefix)]
    return gpu_attention.places_of([0, *starts] if prefix else starts, prefix)


def shape_of(lengths, prefix, step=STEP):
    return Shape.of(row_of(lengths, prefix), False, step)


def test_shapes_are_few_and_rows_little_longer():
    """Of rows as they are packed: up to 2048 tokens, of segments of 50 to 500."""
    draw = torch.Generator().manual_seed(0)
    shapes = Counter()
    for _ in range(400):
        lengths, full = [], int(torch.randint(1500, 2000, (), generator=draw))
        while (n := int(torch.randint(50, 500, (), generator=draw))) + sum(lengths) < full:
            lengths.append(n)
        shape = shape_of(lengths, 20, 128)
        assert 20 + sum(lengths) < shape.tokens <= 20 + sum(lengths) + 128
        shapes[shape] += 1
    assert len(shapes) <= 24
    assert sum(n for _, n in shapes.most_common(MOST)) > 380


@pytest.mark.parametrize("prefix", [0, 1, 37])
@pytest.mark.parametrize("seed", range(8))
def test_a_row_fits_its_shape(seed, prefix):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 300, (int(torch.randint(1, 20, (), generator=draw)),), generator=draw).tolist()
    shape = shape_of(lengths, prefix)
    queries, keys, longest, _, rows = shape.padded(row_of(lengths, prefix))
    assert longest == shape.longest
    assert len(queries) == len(keys) == shape.segments + 1
    assert queries == sorted(queries)
    assert keys == sorted(keys)
    assert queries[-1] == shape.tokens
    assert keys[-1] == (shape.keys or shape.tokens)
    assert len(rows or []) == shape.keys
    segments = [
        (b - a, d - c) for (a, b), (c, d) in zip(itertools.pairwise(queries), itertools.pairwise(keys), strict=True)
    ]
    assert max(max(pair) for pair in segments) <= shape.longest
    assert all(n_queries or not n_keys for n_queries, n_keys in segments)  # whose gradient nobody would write
    real = [(prefix, prefix)] * (prefix > 0) + [(n, prefix + n) for n in lengths]
    assert segments[: len(real)] == real


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_rows_in_shapes_have_the_gradients_of_rows_as_they_are(make_tiny, tied, recompute):
    base = open_base(make_tiny(Type.Q8_0, tied=tied).path)
    plain, other = adapted(base), with_graphs(adapted(base))
    plain.recompute = other.recompute = recompute
    assert_same_steps(plain, other, ROWS * OFTEN)
    assert other.graphs.count == len({shape_of(*row) for row in ROWS})


@pytest.mark.parametrize(
    ("where", "is_recorded"),
    [
        (Where(bias="all"), True), (Where(modules_to_save=("lm_head",)), True),
        (Where(("q_proj",), modules_to_save=("embed_tokens",)), True), (Where(modules_to_save=("k_proj",)), False),
    ],
    ids=["biases", "head", "embedding", "a layer"],
)  # fmt: skip
def test_what_is_trained_beside_a_lora_has_its_gradients(family, where, is_recorded):  # noqa: F811
    base = open_base(family("qwen2").folder)
    plain, other = adapted(base, targets=where), with_graphs(adapted(base, targets=where))
    assert_same_steps(plain, other, ROWS * OFTEN)
    assert (other.graphs.count > 0) == is_recorded


def test_a_shape_that_came_once_is_not_recorded(tiny, monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 4)
    decoder = with_graphs(adapted(open_base(tiny.path)))
    for time in range(1, OFTEN + 2):
        backward(decoder, 0, [50], 0)
        assert decoder.graphs.count == (time >= OFTEN)
    with torch.no_grad():  # what is measured is launched as it comes
        decoder(torch.arange(50), torch.arange(50), [0, 50])
    for n in (64, 80, 96, 112, 128):
        for _ in range(OFTEN):
            backward(decoder, 0, [n], 0)
    assert decoder.graphs.count == 4
    for time in range(1, OFTEN + 1):  # the first has made room, and has to come as often again
        backward(decoder, 0, [50], 0)
        assert (shape_of([50], 0) in decoder.graphs._recorded) == (time == OFTEN)


def test_another_pass_before_the_first_has_gone_backward(tiny):
    """It would take the memory of what is kept: it is launched instead, and both have their gradients."""
    base = open_base(tiny.path)
    plain, other = adapted(base), with_graphs(adapted(base))
    for _ in range(OFTEN):
        backward(other, 0, [50], 0)
    for parameter in other.parameters():
        parameter.grad = None
    for decoder in (plain, other):
        ids = torch.arange(50)
        first, second = (decoder(one, torch.arange(50), [0, 50]) for one in (ids, ids.flip(0)))
        torch.autograd.backward(decoder.nll(first, ids).sum() + 2 * decoder.nll(second, ids).sum())
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-7)
    abandoned = other(ids, torch.arange(50), [0, 50])
    del abandoned  # nobody waits for it any more
    assert not other.graphs._is_open()


def test_other_weights_are_recorded_anew(tiny):
    base = open_base(tiny.path)
    plain, other = adapted(base), with_graphs(adapted(base))
    assert_same_steps(plain, other, ROWS[:1] * (OFTEN + 1), at_once=1)
    for decoder in (plain, other):
        module = decoder.model.layers[0].mlp.down_proj
        module.delta.lora_A = torch.nn.Parameter(module.delta.lora_A.detach() * 2)
    assert_same_steps(plain, other, ROWS[:1] * (OFTEN + 1), at_once=1)


def test_gradients_that_were_there_are_added_to(tiny):
    """As after a stop in the midst of a step: they come from a checkpoint."""
    base = open_base(tiny.path)
    plain, other = adapted(base), with_graphs(adapted(base))
    for _ in range(OFTEN):
        backward(other, 0, [50], 0)
    for decoder in (plain, other):
        for parameter in decoder.parameters():
            parameter.grad = torch.full_like(parameter, 0.25)
        backward(decoder, 3, [50], 0)
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_recorded_is_launched(tiny, monkeypatch, caplog):
    def fails(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.undo()
    for name in ("usable", "Problem"):  # as `by_places` has them, but for what is recorded
        monkeypatch.setattr(gpu_attention, name, ByPlaces if name == "Problem" else lambda *_: True)
    monkeypatch.setattr(compiled, "usable", lambda *_: False)
    monkeypatch.setattr(flash, "Problem", ByPlaces)
    monkeypatch.setattr(Recorded, "_backward", fails)
    base = open_base(tiny.path)
    plain, other = adapted(base), with_graphs(adapted(base))
    with caplog.at_level(logging.WARNING):
        assert_same_steps(plain, other, ROWS * OFTEN)
    assert [record.message for record in caplog.records] == [
        "layers are launched one kernel at a time: they could not be recorded as CUDA graphs (no room)"
    ]
    assert other.graphs.count == 0


def test_dropout_is_not_recorded(tiny):
    decoder = adapted(open_base(tiny.path))
    linears = [module for module in decoder.model.layers.modules() if isinstance(module, Linear)]
    assert stamp_of(linears) is not None
    for linear in linears:
        linear.delta = dropout.DroppedDelta(linear.delta, 0.5)
    assert stamp_of(linears) is not None
    dropout.draw([linear.delta for linear in linears], torch.Generator())
    assert stamp_of(linears) is None


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.linears and not row.dense])
def test_methods_that_repeat_are_two_matrices_for_each_layer(tiny, method):
    base = open_base(tiny.path)
    decoder = build_decoder(base, "blocks", torch.float32, "cpu")
    inject(decoder, method, 4, 8.0, 0)
    linears = [module for module in decoder.model.layers.modules() if isinstance(module, Linear)]
    assert METHODS[method].repeats == (
        stamp_of(linears) is not None and not METHODS[method].waits | METHODS[method].groups
    )
