"""Layers that are computed again in the backward pass: the same gradients, bit for bit, from fewer bytes."""

from __future__ import annotations

import itertools

import pytest
import torch
from packed_rows import adapted
from test_architectures import family, ids  # noqa: F401  (a fixture)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from edgelora.base.model import open_base
from edgelora.nn.recompute import run_again
from edgelora.peft.inject import without_adapter

PREFIX, TAILS = 9, (7, 20, 1)
ROW = torch.cat([ids(PREFIX), *(ids(n) for n in TAILS)])
POSITIONS = torch.cat([torch.arange(PREFIX), *(PREFIX + torch.arange(n) for n in TAILS)])
STARTS = list(itertools.accumulate(TAILS, initial=PREFIX))


def gradients(decoder, *, recompute, offload=False):
    """The loss and every gradient of a packed row with a shared prefix."""
    decoder.recompute, decoder.offload = recompute, offload
    labels = ROW.roll(-1)
    loss = decoder.nll(decoder(ROW, POSITIONS, STARTS, PREFIX), labels).mean()
    return loss.detach(), torch.autograd.grad(loss, list(decoder.parameters()))


def assert_same(decoder, **how):
    loss, plain = gradients(decoder, recompute=False)
    again_loss, again = gradients(decoder, recompute=True, **how)
    assert torch.equal(loss, again_loss)
    assert all(grad.count_nonzero() for grad in plain)
    assert all(map(torch.equal, plain, again))


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    "name", ["llama", "llama-biased", "gemma2", "gemma3_text", "mixtral", "qwen3", "phi3", "olmo2", "granite"]
)
def test_gradients_are_the_same_bits(family, name, compute):  # noqa: F811
    assert_same(adapted(open_base(family(name).folder), compute))


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("method", "how"), [("dora", "blocks"), ("dora", "nf4"), ("rslora", "q4_k")])
def test_gradients_are_the_same_bits_over_any_weights(tiny, method, how, compute):
    assert_same(adapted(open_base(tiny.path), compute, method, how=how))


def test_layers_without_an_adapter_pass_the_gradient_on(tiny):
    assert_same(adapted(open_base(tiny.path), targets=("model.layers.0.self_attn.q_proj",)))


def test_offloaded_inputs_come_back_as_they_were(tiny):
    assert_same(adapted(open_base(tiny.path)), offload=True)


def _tensors(tree):
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Storages(TorchDispatchMode):
    """Every storage that an operation made while this was on."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        if func is torch.ops.aten.resize_.default:
            given = set()  # `room` gives memory that no operation made its shape
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given:  # no view
                self.made[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return out

    def alive(self):
        return sum(n_bytes for storage, n_bytes in self.made.values() if not storage.expired())


def held(decoder, *, recompute):
    """Bytes that the graph holds when the backward pass begins."""
    decoder.recompute = recompute
    decoder(ROW, POSITIONS, STARTS, PREFIX)  # what is made once and kept for all rows
    with Storages() as storages:
        hidden = decoder(ROW, POSITIONS, STARTS, PREFIX)
    assert hidden.requires_grad
    return storages.alive()


@pytest.mark.parametrize(("name", "compute"), [("gemma2", torch.float32), ("phi3", torch.bfloat16)])
def test_only_inputs_are_kept(family, name, compute):  # noqa: F811
    """float32 (T, d) for each layer and at the end, and the tables of one rotation or two."""
    decoder = adapted(open_base(family(name).folder), compute)
    c, n = decoder.config, len(ROW)
    least = (c.num_hidden_layers + 1) * n * c.hidden_size * 4
    assert least <= held(decoder, recompute=True) <= least + 2 * n * c.rope.dim * 4 + n * 4
    assert held(decoder, recompute=False) > 2.5 * held(decoder, recompute=True)


def test_nothing_is_run_twice_without_a_gradient(tiny):
    decoder, runs = adapted(open_base(tiny.path)), []
    decoder.recompute = True
    decoder.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad(), without_adapter(decoder):
        decoder(ROW, POSITIONS, STARTS, PREFIX)
    assert len(runs) == 1
    gradients(decoder, recompute=True)
    assert len(runs) == 3


def test_what_needs_no_gradient_gets_none():
    x, w = torch.ones(2), torch.tensor(3.0, requires_grad=True)
    run_again(lambda x: x * w, x, (w,)).sum().backward()
    assert (x.grad, w.grad) == (None, 2.0)
    assert not run_again(lambda x: x * 2, x, ()).requires_grad
