"""The layers' hand-written backward passes against finite differences, and their forwards against plain torch."""

from __future__ import annotations

import itertools
import weakref
from functools import partial

import pytest
import torch
from exact import Exact, draw
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from edgelora.architectures import Rope
from edgelora.base.weights import Dense
from edgelora.nn import attention, loss, products
from edgelora.nn.activations import GATES, SwiGLU, swiglu
from edgelora.nn.attention import SegmentAttention
from edgelora.nn.layer import Residual
from edgelora.nn.linear import FrozenLinear, LoraLinears
from edgelora.nn.loss import LinearCrossEntropy, Target
from edgelora.nn.norm import Norm, RMSNorm
from edgelora.nn.recompute import recomputed
from edgelora.nn.rotary import Rotary, rotary_tables
from edgelora.nn.scores import Scores
from edgelora.nn.scratch import room

STARTS = [0, 5, 6, 11]  # three segments, one of them a single token
LAYOUTS = [([0, 11], 0), (STARTS, 0), ([4, 7, 11], 4)]  # one segment, three, and two behind a shared prefix
HOW = [Scores(0.4), Scores(0.4, window=3), Scores(0.4, softcap=1.5), Scores(0.4, window=2, softcap=1.5)]


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of tiny products: waking a second thread for each is slow, on a busy machine a hundred times so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gradcheck(function, *inputs):
    return torch.autograd.gradcheck(function, inputs, atol=1e-6, rtol=1e-5)


def per_segment(q, k, v, starts):
    """The oracle: F.scaled_dot_product_attention on each segment alone. q (T, H, d), k and v (T, KV, d)."""
    parts = []
    for first, last in itertools.pairwise(starts):
        heads = (x[first:last].transpose(0, 1) for x in (q, k, v))  # each (H or KV, n, d)
        parts.append(F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(0, 1))
    return torch.cat(parts)


def plain_rms_norm(x, w, eps):
    return F.rms_norm(x, x.shape[-1:], w, eps)


# -- forwards against torch and transformers ----------------------------------------------------------------------


def test_rms_norm_is_that_of_torch():
    x, w = draw(4, 6), draw(6, seed=1)
    torch.testing.assert_close(RMSNorm.apply(x, w, 1e-5), plain_rms_norm(x, w, 1e-5))


def test_rotary_is_that_of_transformers():
    config = LlamaConfig(hidden_size=32, num_attention_heads=2, head_dim=16, rope_theta=10000.0)
    positions = torch.tensor([0, 1, 2, 0, 1, 300])
    x = draw(6, 2, 16, dtype=torch.float32)  # (T, H, d)
    cos, sin = LlamaRotaryEmbedding(config)(x, positions[None])
    theirs, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)  # (1, H, T, d)
    ours = Rotary.apply(x, *rotary_tables(positions, Rope(10000.0, 16)))
    torch.testing.assert_close(ours, theirs[0].transpose(0, 1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("act", GATES)
def test_gated_units_are_those_of_transformers(act):
    gate, up = draw(3, 5), draw(3, 5, seed=1)
    torch.testing.assert_close(GATES[act].function.apply(gate, up), ACT2FN[act](gate) * up)


def explicit(q, k, v, starts, prefix, how):
    """Attention by a whole mask: position and segment of every pair of tokens."""
    size = len(q)
    segment = torch.zeros(size, dtype=torch.long)
    position = torch.arange(size)
    for number, (begin, end) in enumerate(itertools.pairwise(starts), 1):
        segment[begin:end] = number
        position[begin:end] = prefix + torch.arange(end - begin)
    same = (segment[:, None] == segment) | (segment == 0 if prefix else False)
    distance = position[:, None] - position
    seen = same & (distance >= 0) & (distance < (how.window or size + 1))
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * how.scale
    if how.softcap:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("tile", [1, 2, 256])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("how", [*HOW, Scores(0.4, window=1), Scores(0.4, window=100)])
@pytest.mark.parametrize(("starts", "prefix"), LAYOUTS)
def test_attention_is_that_of_an_explicit_mask(monkeypatch, tile, kv_heads, how, starts, prefix):
    monkeypatch.setattr(attention, "QUERY_TILE", tile)
    q, k, v = draw(11, 4, 6), draw(11, kv_heads, 6, seed=1), draw(11, kv_heads, 6, seed=2)
    found = SegmentAttention.apply(q, k, v, starts, prefix, how)
    torch.testing.assert_close(found, explicit(q, k, v, starts, prefix, how))


@pytest.mark.parametrize("starts", [[0, 11], STARTS])
def test_attention_is_that_of_torch_in_each_segment(starts):
    q, k, v = draw(11, 4, 6), draw(11, 2, 6, seed=1), draw(11, 2, 6, seed=2)
    found = SegmentAttention.apply(q, k, v, starts, 0, Scores(6**-0.5))
    torch.testing.assert_close(found, per_segment(q, k, v, starts))


@pytest.mark.parametrize("chunks", [(1 << 20, 8192), (2 * 7, 3)])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_linear_cross_entropy_is_that_of_torch_on_explicit_logits(monkeypatch, chunks, softcap, smoothing):
    monkeypatch.setattr(loss, "LOGITS", chunks[0])
    monkeypatch.setattr(loss, "VOCABULARY_ROWS", chunks[1])
    hidden, head = draw(5, 4, grad=True), draw(7, 4, seed=1)
    labels = torch.tensor([0, 6, 3, 3, 2])  # the first and the last row of the head, and one twice
    ours = LinearCrossEntropy.apply(hidden, Exact(head), labels, Target(softcap, smoothing))
    explicit_logits = hidden @ head.T
    if softcap:
        explicit_logits = softcap * torch.tanh(explicit_logits / softcap)
    expected = F.cross_entropy(explicit_logits, labels, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(ours, expected)
    weights = draw(5, seed=2)  # each position's gradient is its own
    found, wanted = (torch.autograd.grad(x @ weights, hidden)[0] for x in (ours, expected))
    torch.testing.assert_close(found, wanted)


def test_linear_cross_entropy_survives_logits_that_overflow_exp():
    hidden, head = torch.tensor([[1000.0]]), torch.tensor([[1.0], [-1.0]])  # logits 1000 and -1000
    nll = LinearCrossEntropy.apply(hidden, Dense(head), torch.tensor([1]))
    assert nll.tolist() == [2000.0]  # log(e^1000 + e^-1000) - (-1000)


def test_logits_are_those_of_the_whole_head(monkeypatch):
    monkeypatch.setattr(loss, "VOCABULARY_ROWS", 3)
    hidden, head = draw(2, 4, dtype=torch.float32), draw(7, 4, seed=1, dtype=torch.float32)
    torch.testing.assert_close(loss.logits(hidden, Dense(head)), hidden @ head.T)


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize(
    ("out", "a", "b"),
    [("f32", "f32", "f32"), ("f32", "f32", "bf16"), ("f32", "bf16", "bf16"), ("bf16", "bf16", "bf16")],
)
def test_a_product_is_added_to_what_is_there(monkeypatch, ours, out, a, b):
    """Whoever computes it: the compiled code where this processor has it, or torch."""
    if not ours:
        monkeypatch.setattr(products, "pay", lambda *_: False)
    kinds = {"f32": torch.float32, "bf16": torch.bfloat16}
    there, left, right = draw(12, 6).to(kinds[out]), draw(12, 8, seed=1).to(kinds[a]), draw(8, 6, seed=2).to(kinds[b])
    wanted = there.double() + left.double() @ right.double()
    found = products.add_product(there, left, right)
    assert found is there
    rounding = 2**-7 if "bf16" in (out, a) else 1e-5  # torch rounds the product before it adds it
    torch.testing.assert_close(found.double(), wanted, atol=4 * rounding, rtol=rounding)


# -- backwards against finite differences -------------------------------------------------------------------------


@pytest.mark.parametrize("by_output", [False, True])
def test_gradient_of_rms_norm(by_output):
    x, w = draw(4, 6, grad=True), draw(6, seed=1, grad=True)
    assert gradcheck(lambda x, w: RMSNorm.apply(x, w, 1e-5, None, by_output), x, w)


@pytest.mark.parametrize(("compute", "bits"), [(torch.float32, 0.0), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("shape", [(5, 64), (3, 6)], ids=["compiled", "torch"])
def test_a_norm_lets_its_input_go(shape, compute, bits):
    """Its output says the same; where a weight is 0 it does not, and the input is kept."""
    x, dy, w = draw(*shape).float(), draw(*shape, seed=3).to(compute), draw(shape[-1], seed=1).float() + 3
    gone = Norm(w, 1e-5, compute)
    kept = Norm(w.clone().index_fill_(0, torch.tensor([2]), 0.0), 1e-5, compute)
    for norm, lets_go in ((gone, True), (kept, False)):
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        saved = y.grad_fn.saved_tensors[0]
        assert saved.data_ptr() == (y if lets_go else leaf).data_ptr()
        (found,) = torch.autograd.grad(y, leaf, dy)
        again = x.double().requires_grad_()
        exact = plain_rms_norm(again, norm.weight.double(), 1e-5)
        (expected,) = torch.autograd.grad(exact, again, dy.double())
        assert (found - expected).norm() <= (1e-5 + lets_go * bits) * expected.norm()


def test_a_residual_stream_stays_wide():
    x, y = draw(3, 4).float().requires_grad_(), draw(3, 4, seed=1).bfloat16().requires_grad_()
    out = Residual.apply(x, y, 0.5)
    torch.testing.assert_close(out, x + y.float() * 0.5)
    dx, dy = torch.autograd.grad(out, (x, y), draw(3, 4, seed=2).float())
    assert (dx.dtype, dy.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(dy, (dx * 0.5).bfloat16())


def test_room_is_aligned_and_of_any_shape():
    for sizes in ((5, 7), (0, 3), (3, 2, 4), ()):
        found = room(*sizes, dtype=torch.bfloat16)
        assert (found.shape, found.dtype, found.is_contiguous()) == (torch.Size(sizes), torch.bfloat16, True)
        assert found.data_ptr() % 64 == 0
    rooms = [room(1000, dtype=torch.float32).fill_(i) for i in range(20)]
    assert all((x == i).all() for i, x in enumerate(rooms))


@pytest.mark.parametrize("rotated", [6, 4])
def test_gradient_of_rotary(rotated):
    cos, sin = (table.double() for table in rotary_tables(torch.tensor([0, 3, 70]), Rope(10000.0, rotated)))
    assert gradcheck(lambda x: Rotary.apply(x, cos, sin), draw(3, 2, 6, grad=True))


@pytest.mark.parametrize("act", GATES)
def test_gradient_of_gated_units(act):
    assert gradcheck(GATES[act].function.apply, draw(3, 5, grad=True), draw(3, 5, seed=1, grad=True))


@pytest.mark.parametrize("tile", [2, 256])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("starts", "prefix"), LAYOUTS)
def test_gradient_of_attention(monkeypatch, tile, kv_heads, how, starts, prefix):
    monkeypatch.setattr(attention, "QUERY_TILE", tile)
    q, k, v = draw(11, 4, 3, grad=True), draw(11, kv_heads, 3, seed=1, grad=True), draw(11, kv_heads, 3, seed=2)
    assert gradcheck(lambda *qkv: SegmentAttention.apply(*qkv, starts, prefix, how), q, k, v.requires_grad_())


@pytest.mark.parametrize("chunks", [(1 << 20, 8192), (2 * 7, 3)])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradient_of_linear_cross_entropy(monkeypatch, chunks, softcap):
    monkeypatch.setattr(loss, "LOGITS", chunks[0])
    monkeypatch.setattr(loss, "VOCABULARY_ROWS", chunks[1])
    head, labels = Exact(draw(7, 4, seed=1)), torch.tensor([0, 6, 3, 3, 2])
    assert gradcheck(lambda x: LinearCrossEntropy.apply(x, head, labels, Target(softcap)), draw(5, 4, grad=True))


def test_gradient_of_frozen_linear():
    weight = Dense(draw(3, 4, seed=1))
    assert gradcheck(lambda x: FrozenLinear.apply(x, weight), draw(5, 4, grad=True))


def test_gradient_of_loras_over_the_same_input():
    weights = [Dense(draw(3, 4, seed=1)), Dense(draw(2, 4, seed=5))]
    x, *pairs = draw(5, 4), draw(2, 4, seed=2), draw(3, 2, seed=3), draw(1, 4, seed=6), draw(2, 1, seed=7)
    inputs = [tensor.requires_grad_() for tensor in (x, *pairs)]
    assert gradcheck(lambda x, *pairs: LoraLinears.apply(x, weights, [1.7, 0.3], *pairs), *inputs)


def test_a_lora_is_the_sum_of_both_paths():
    x, w, a, b = draw(5, 4), draw(3, 4, seed=1), draw(2, 4, seed=2), draw(3, 2, seed=3)
    (y,) = LoraLinears.apply(x, [Dense(w)], [1.7], a, b)
    torch.testing.assert_close(y, x @ (w + 1.7 * b @ a).T)


# -- recomputed ---------------------------------------------------------------------------------------------------


def gradients(make_block):
    """Gradients through silu(gate) · up @ w, whose product needs the hidden value again, and a life sign of it."""
    gate, up, w = draw(4, 4, grad=True), draw(4, 4, seed=1, grad=True), draw(4, 4, seed=2, grad=True)
    hidden = SwiGLU.apply(gate, up)
    with make_block(hidden, partial(swiglu, gate.detach(), up.detach())):
        out = hidden @ w
    alive = weakref.ref(hidden)
    del hidden
    kept = alive() is not None
    return torch.autograd.grad(out.square().sum(), (gate, up, w)), kept


def plain(value, make):  # noqa: ARG001
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


def test_recomputed_gives_identical_gradients_and_lets_the_value_go():
    expected, kept = gradients(plain)
    assert kept  # else the next line could not fail
    found, kept = gradients(recomputed)
    assert not kept
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_recomputed_leaves_other_tensors_of_the_same_shape_alone():
    value, other, w = draw(4, 4), draw(4, 4, seed=1), draw(4, 4, seed=2, grad=True)
    with recomputed(value, lambda: pytest.fail("not the value that was saved")):
        out = (other @ w).sum()
    torch.testing.assert_close(torch.autograd.grad(out, w)[0], other.T @ torch.ones(4, 4, dtype=torch.float64))


def test_recomputed_tells_a_square_value_from_its_transpose():
    value, w = draw(4, 4), draw(4, 4, seed=1, grad=True)
    with recomputed(value, value.clone):
        out = (value.T @ w).sum()
    torch.testing.assert_close(torch.autograd.grad(out, w)[0], value @ torch.ones(4, 4, dtype=torch.float64))
