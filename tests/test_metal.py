"""On a Mac: what Metal and MPS compute is what the CPU computes, and states and tensors come back from its memory.

Each test also runs on the CPU alone, against itself, so that it is known to work where there is no Mac.
"""

from __future__ import annotations

import sys
from contextlib import closing, contextmanager

import llama_cpp
import numpy as np
import pytest
import torch
from test_export import make_adapter
from test_methods import stir

from converters.adapter_to_gguf import write_adapter_gguf
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.peft.inject import inject
from edgelora.pipeline.doctor import _features
from runtime.binding import Context, Entry, Lora, Model, Placement

TOKENS = tuple(range(5, 37))
HAS_METAL = sys.platform == "darwin" and llama_cpp.llama_supports_gpu_offload()
LAYERS = pytest.mark.parametrize(
    "layers",
    [
        0,
        pytest.param(
            -1,
            marks=[pytest.mark.metal, pytest.mark.skipif(not HAS_METAL, reason="no Mac with a llama.cpp for Metal")],
            id="metal",
        ),
    ],
)
DEVICE = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "mps",
            marks=[
                pytest.mark.metal,
                pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no GPU that torch drives by MPS"),
            ],
        ),
    ],
)


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    path, base = tmp_path_factory.mktemp("adapter") / "a.gguf", open_base(tiny.path)
    write_adapter_gguf(path, make_adapter(base, strength=0.5), base, "a")
    return path


@contextmanager
def opened(path, layers, **options):
    with closing(Model(path, placement=Placement(gpu_layers=layers))) as model:
        context = Context(model, n_ctx=64, n_sequences=2, threads=1, n_batch=64, **options)
        with closing(context):
            yield context


def evaluate(context, tokens=TOKENS, first=0, sequence=0):
    """float32 (T, V) of `tokens` at positions from `first` on."""
    return context.decode([Entry(token, first + i, sequence, True) for i, token in enumerate(tokens)]).copy()


def mean_kl(reference, found):
    p, q = (torch.from_numpy(z).log_softmax(-1) for z in (reference, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


@LAYERS
def test_layers_on_the_gpu_compute_what_the_cpu_computes(tiny, adapter, layers):
    with opened(tiny.path, 0) as context:
        plain = evaluate(context)
        context.clear()
        context.set_adapters([(Lora(context.model, adapter), 1.0)])
        adapted = evaluate(context)
    with opened(tiny.path, layers) as context:
        assert mean_kl(plain, evaluate(context)) < 1e-3
        context.clear()
        context.set_adapters([(Lora(context.model, adapter), 1.0)])
        assert mean_kl(adapted, evaluate(context)) < 1e-3
    assert mean_kl(plain, adapted) > 1e-2


@LAYERS
def test_a_state_comes_back_from_where_it_is_kept(tiny, layers):
    """The keys and values of a sequence, read from the GPU's memory and written to another context's."""
    with opened(tiny.path, layers) as context:
        evaluate(context)
        state = context.save(0)
        wanted = evaluate(context, (40, 41), len(TOKENS))
    with opened(tiny.path, layers) as context:
        fresh = evaluate(context, (40, 41))
        context.clear()
        context.restore(0, state)
        np.testing.assert_array_equal(evaluate(context, (40, 41), len(TOKENS)), wanted)
    assert np.abs(fresh - wanted).max() > 0.01


@LAYERS
def test_what_goes_into_a_product_is_read_from_where_it_is_computed(tiny, layers):
    """By ggml_backend_tensor_get, as importance matrices are collected."""
    seen = []
    for on in (0, layers):
        inputs = {}

        def watch(product, ask, inputs=inputs):
            if ask:
                return product.operation == "MUL_MAT" and product.weight.startswith("blk.")
            inputs[product.weight] = product.input()
            return True

        with opened(tiny.path, on, watch=watch) as context:
            evaluate(context)
        seen.append(inputs)
    cpu, other = seen
    assert cpu.keys() == other.keys()
    assert {"blk.0.attn_q.weight", "blk.1.ffn_down.weight"} <= cpu.keys()
    for name, x in cpu.items():
        np.testing.assert_allclose(other[name], x, atol=2e-2 * np.abs(x).max(), err_msg=name)


@DEVICE
def test_torch_on_mps_computes_what_it_computes_on_the_cpu(tiny, device):
    base, ids = open_base(tiny.path), torch.tensor(TOKENS)
    wanted = build_decoder(base).logits(ids)
    found = build_decoder(base, device=device).logits(ids.to(device)).cpu()
    assert mean_kl(wanted.detach().numpy(), found.detach().numpy()) < 1e-5


@DEVICE
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "lorma_pi"])
def test_a_step_on_mps_has_the_gradients_of_one_on_the_cpu(tiny, device, method):
    found = []
    for on in ("cpu", device):
        base, ids = open_base(tiny.path), torch.tensor(TOKENS, device=on)
        decoder = build_decoder(base, device=on)
        inject(decoder, method, 4, 8.0, seed=0)
        stir(decoder)
        decoder.to(on)
        positions = torch.arange(len(ids), device=on)
        loss = decoder.nll(decoder(ids, positions, [0, len(ids)])[:-1], ids[1:]).sum()
        loss.backward()
        found.append([loss.detach().cpu(), *(p.grad.cpu() for p in decoder.parameters())])
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_doctor_names_the_gpu_that_llama_cpp_was_built_for():
    """As `llama_print_system_info` of the pinned version writes it: a part's name, then its features."""
    assert _features("MTL : EMBED_LIBRARY = 1 | CPU : NEON = 1 | REPACK = 1 | ") == "built with NEON, REPACK, Metal"
    assert _features("CUDA : ARCHS = 900 | USE_GRAPHS = 1 | CPU : AVX2 = 1 | ") == "built with AVX2, CUDA"
