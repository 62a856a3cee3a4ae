"""A training step on torch's meta device, which holds no numbers: all that it reads and makes lies there.

What is left on the CPU or rounded to another dtype fails there as it would on a graphics card or a Mac's GPU.
"""

from __future__ import annotations

import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type

from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.peft.inject import inject
from edgelora.peft.methods import METHODS
from edgelora.peft.targets import Where

IDS = torch.arange(3, 40)
STARTS = [5, 20, 37]  # two segments behind a shared beginning


def step(base, held="blocks", dtype=torch.float32, method="lora", dropout=0.0):
    """The decoder, on the meta device, once it has gradients."""
    decoder = build_decoder(base, held, dtype)
    inject(decoder, method, 4, 8.0, 0, Where(lora_dropout=dropout))
    for reader in (*decoder.linears.values(), decoder.model.embed_tokens):
        reader.weight = reader.weight.to("meta")
    decoder.head = decoder.head.to("meta")
    decoder.to("meta")
    hidden = decoder(IDS.to("meta"), IDS.to("meta"), STARTS, 5)
    loss = decoder.nll(hidden, IDS.to("meta")).sum()
    assert loss.device.type == "meta"
    loss.backward()
    return decoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("held", ["blocks", "nf4", "bf16", "f32"])
def test_it_stays_there_however_weights_are_held(make_tiny, held, dtype):
    decoder = step(open_base(make_tiny(Type.Q8_0).path), held, dtype)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in decoder.parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("method", METHODS)
def test_it_stays_there_whatever_is_trained(tiny, method, dropout):
    if dropout and not METHODS[method].drops:
        pytest.skip("it takes no dropout")
    if METHODS[method].rows:
        pytest.skip("which of the ids are trained ones cannot be seen there")
    held = "f32" if METHODS[method].trains_weights else "blocks"
    decoder = step(open_base(tiny.path), held, torch.bfloat16, method, dropout)
    assert [name for name, p in decoder.named_parameters() if p.grad is None] == []
