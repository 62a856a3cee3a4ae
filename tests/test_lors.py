"""LoRS over a pruned model: against the masked product written out, and the zeros of a weight after it is merged."""

from __future__ import annotations

import shutil

import gguf
import numpy as np
import pytest
import torch
from merging import require_merged_computes
from same_tokens import IDS
from stirred import Stir
from torch.nn import functional as F

from converters.merge import Part
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.base.weights import Dense
from edgelora.nn.linear import Linear
from edgelora.peft import lors
from edgelora.peft.adapter import write_adapter
from edgelora.pipeline.merge import MergeOptions, Wanted, write_gguf


@pytest.fixture(scope="module")
def pruned(tiny, tmp_path_factory):
    """The tiny model with half of the weights of each layer zero, 0 or −0 as a mask of ones and zeros leaves them."""
    path = tmp_path_factory.mktemp("pruned") / "pruned.gguf"
    shutil.copy(tiny.path, path)
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            tensor.data[:] *= np.abs(tensor.data) > np.median(np.abs(tensor.data))
            tensor.data.flush()
    return open_base(path)


def trained(base):
    return Stir(rank=4, alpha=8.0, by=0.1).on(base, "lors")


def one_layer(values, dtype=torch.float32):
    linear = Linear(Dense(values.to(dtype)))
    linear.delta = lors.fresh(linear.weight, 3, 4.0, torch.Generator().manual_seed(1))
    with torch.no_grad():
        linear.delta.lora_B += torch.randn(7, 3, generator=torch.Generator().manual_seed(2))
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_the_masked_product(dtype):
    draw = torch.Generator().manual_seed(0)
    values, x = torch.randn(7, 5, generator=draw), torch.randn(11, 5, generator=draw)
    values[values.abs() < 0.7] = 0
    linear = one_layer(values, dtype)
    before, delta = linear.weight.values.clone(), linear.delta
    w, a, b = before.float(), delta.lora_A, delta.lora_B
    wanted = F.linear(x, w + (w != 0) * (4 / 3 * b @ a))
    assert (w == 0).any()
    torch.testing.assert_close(linear(x), wanted)
    found = torch.autograd.grad(linear(x).square().sum(), [a, b])
    torch.testing.assert_close(found, torch.autograd.grad(wanted.square().sum(), [a, b]))
    assert torch.equal(linear.weight.values, before)  # no buffer was the weight itself


def test_over_a_weight_without_zeros_it_is_a_lora():
    x = torch.randn(11, 5, generator=torch.Generator().manual_seed(3))
    linear = one_layer(torch.full((7, 5), 0.5))
    torch.testing.assert_close(linear(x), x @ (0.5 + 4 / 3 * linear.delta.lora_B @ linear.delta.lora_A).T)


@pytest.mark.parametrize("quant", ["F32", "F16"])
def test_zeros_stay_zeros_bit_for_bit_when_it_is_merged(pruned, tmp_path, quant):
    _, adapter = trained(pruned)
    write_gguf(tmp_path / "x.gguf", pruned, [Part(adapter, 1.0, "0", "mine")], Wanted.read(quant, MergeOptions()))
    merged = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    for tensor in gguf.GGUFReader(pruned.path).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            zero, found = tensor.data == 0, merged[tensor.name]
            assert zero.mean() == pytest.approx(0.5, abs=0.01)
            bits = found.view(f"u{found.itemsize}")[zero]
            assert np.array_equal(bits, tensor.data.astype(found.dtype).view(bits.dtype)[zero])  # −0 is still −0
            assert len(np.unique(bits)) == 2
            assert (found[~zero] != tensor.data[~zero].astype(found.dtype)).mean() > 0.9


def test_merged_it_computes_the_same_in_llama_cpp(pruned, tmp_path):
    decoder, adapter = trained(pruned)
    live = decoder.logits(IDS)
    assert float((live - build_decoder(pruned).logits(IDS)).abs().max()) > 0.1
    write_adapter(tmp_path / "mine", adapter)
    require_merged_computes(pruned, tmp_path / "mine", IDS, live)


def test_its_file_holds_two_small_matrices_and_no_mask(pruned):
    _, adapter = trained(pruned)
    for module, (d_out, d_in) in pruned.linears.items():
        assert {name: t.shape for name, t in adapter.tensors[module].items()} == {
            "lora_A": (4, d_in), "lora_B": (d_out, 4),
        }  # fmt: skip


def test_neither_mask_nor_masked_weight_is_kept_for_the_backward_pass():
    linear, kept = one_layer(torch.eye(7)[:, :5]), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        linear(torch.ones(3, 5))
    assert (7, 5) not in kept
