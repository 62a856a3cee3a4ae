"""The decoder against transformers and against llama.cpp, on the same weights."""

from __future__ import annotations

import pytest
import torch
from gguf.constants import GGMLQuantizationType

from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.evaluate.fidelity import fidelity
from edgelora.peft.inject import inject
from runtime.scorer import ScoringEngine


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("length", [1, 7, 300])
def test_logits_are_those_of_transformers(make_tiny, transformers_model, tied, length):
    tiny = make_tiny(tied=tied)
    ids = torch.randint(3, 512, (length,), generator=torch.Generator().manual_seed(length))
    ours = build_decoder(open_base(tiny.path)).logits(ids)  # (T, V)
    theirs = transformers_model(tiny)(ids[None]).logits[0].detach()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_packed_segments_do_not_see_each_other(tiny):
    decoder = build_decoder(open_base(tiny.path))
    first, second = torch.arange(3, 40), torch.arange(100, 111)
    positions = torch.cat([torch.arange(37), torch.arange(11)])
    packed = decoder(torch.cat([first, second]), positions, [0, 37, 48])
    alone = [decoder(ids, torch.arange(len(ids)), [0, len(ids)]) for ids in (first, second)]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "flip_nats", "kl"),
    [
        (GGMLQuantizationType.F32, 1e-3, 1e-6),
        (GGMLQuantizationType.F16, 1e-2, 1e-4),
        (GGMLQuantizationType.Q8_0, 0.5, 5e-3),
        (GGMLQuantizationType.Q4_K, 1.0, 3e-2),
    ],
)
def test_logits_are_those_of_llama_cpp(make_tiny, kind, flip_nats, kl):
    base = open_base(make_tiny(kind).path)
    ids = list(range(3, 103))
    ours = build_decoder(base).logits(torch.tensor(ids)).numpy()
    with ScoringEngine(base, n_ctx=256, threads=2) as engine:
        theirs = engine.logits([ids], [list(range(100))])
    found = fidelity([(ours, theirs)])
    assert found.worst_flip_nats <= flip_nats
    assert found.kl_mean <= kl


# -- products in bfloat16 -----------------------------------------------------------------------------------------


def loss_and_gradients(path, held, compute):
    """Of one packed row of two segments, with a LoRA whose B is not zero."""
    decoder = build_decoder(open_base(path), held, compute)
    parameters = inject(decoder, "lora", 4, 8.0, seed=0)
    draw = torch.Generator().manual_seed(1)
    for parameter in parameters[1::2]:  # B
        parameter.data.normal_(0, 0.02, generator=draw)
    ids = torch.randint(3, 512, (96,), generator=draw)
    hidden = decoder(ids, torch.cat([torch.arange(64), torch.arange(32)]), [0, 64, 96])
    loss = decoder.nll(hidden[:-1], ids[1:]).mean()
    return float(loss.detach()), torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("held", ["blocks", "bf16", "nf4"])
def test_gradients_of_bfloat16_products_are_nearly_those_of_float32(make_tiny, held):
    """The residual stream and norms stay float32: with those in bfloat16 too, every stack is off by some 40 %."""
    path = make_tiny(GGMLQuantizationType.Q8_0).path
    exact, wanted = loss_and_gradients(path, held, torch.float32)
    loss, found = loss_and_gradients(path, held, torch.bfloat16)
    assert loss == pytest.approx(exact, rel=2e-3)
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
    assert all(gradient.dtype == torch.float32 for gradient in found)
    assert 0 < sorted(errors)[len(errors) // 2] <= 0.05


def test_a_block_is_narrowed_to_the_nearest_bfloat16(make_tiny):
    for linear in build_decoder(open_base(make_tiny(GGMLQuantizationType.Q4_K).path)).linears.values():
        wide = linear.weight.dequantize().clone()
        assert torch.equal(linear.weight.dequantize(torch.bfloat16), wide.to(torch.bfloat16))
        assert torch.equal(linear.weight.rows(3, 9, torch.bfloat16), wide[3:9].to(torch.bfloat16))
