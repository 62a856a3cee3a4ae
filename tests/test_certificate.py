"""A model file is held against what it was made from before it gets its name, and what fails is kept aside."""

from __future__ import annotations

import torch
from gguf.constants import GGMLQuantizationType as Type
from test_export import make_adapter, make_dora

from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.evaluate.fidelity import Fidelity
from edgelora.evaluate.thresholds import limits_of
from edgelora.peft.blend import blend
from edgelora.pipeline.certificate import ModelCertificate
from edgelora.pipeline.compare import Compared

IDS = torch.arange(3, 60)


def same(kl: float = 0.0, top: float = 1.0, flip: float = 0.0) -> Fidelity:
    return Fidelity(100, kl, kl, kl, kl, top, flip)


def make(kind: Type = Type.Q4_0, **compared) -> ModelCertificate:
    found = {"n_rows": 8, "equal_ids": 8, "equal_text": 8, "equal_ends": 8, "fidelity": same(), "loss": same()}
    return ModelCertificate({kind.name: 3}, Compared(**{**found, **compared}), limits_of([kind]))


# -- the reference: several adapters at their scales --------------------------------------------------------------


def test_a_blend_is_the_merged_weights(tiny):
    """Oracle: W + Σ s ΔW written into the weights of a decoder; a DoRA's change is measured from the base's own W."""
    base = open_base(tiny.path)
    adapters = [(make_adapter(base, seed=1), 0.5), (make_dora(base), 1.0), (make_adapter(base, seed=2), -2.0)]
    blended, merged = build_decoder(base), build_decoder(base, "f32")
    blend(blended, adapters)
    plain = merged.logits(IDS).clone()
    for name, linear in merged.linears.items():
        w = linear.weight.dequantize().numpy().copy()
        change = sum(scale * adapter.pairs()[name].change(w) for adapter, scale in adapters)
        linear.weight.dequantize().add_(torch.from_numpy(change))
    torch.testing.assert_close(blended.logits(IDS), merged.logits(IDS), atol=2e-4, rtol=0)
    assert (blended.logits(IDS) - plain).abs().max() > 0.1


def test_a_blend_of_one_at_scale_1_is_that_adapter(tiny):
    from edgelora.peft.inject import attach

    base = open_base(tiny.path)
    one, other = build_decoder(base), build_decoder(base)
    attach(one, make_adapter(base))
    blend(other, [(make_adapter(base), 1.0)])
    torch.testing.assert_close(one.logits(IDS), other.logits(IDS), atol=2e-5, rtol=0)
    blend(other, [])
    torch.testing.assert_close(other.logits(IDS), build_decoder(base).logits(IDS), atol=0, rtol=0)
