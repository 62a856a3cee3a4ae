"""The decoder against transformers and against llama.cpp, on the same weights."""

from __future__ import annotations

import pytest
import torch
from gguf.constants import GGMLQuantizationType

from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.evaluate.fidelity import fidelity
from runtime.engine import Engine


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
    with Engine(base, n_ctx=256, threads=2) as engine:
        theirs = engine.logits([ids], [list(range(100))])
    found = fidelity([(ours, theirs)])
    assert found.worst_flip_nats <= flip_nats
    assert found.kl_mean <= kl
