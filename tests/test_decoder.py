"""The decoder against transformers and against llama.cpp, on the same weights."""

from __future__ import annotations

import pytest
import torch
from gguf.constants import GGMLQuantizationType
from transformers import LlamaConfig, LlamaForCausalLM

from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.evaluate.fidelity import fidelity
from runtime.engine import Engine


def transformers_model(tiny) -> LlamaForCausalLM:
    """The oracle: HF's own model with the tiny model's weights copied in."""
    c = tiny.config
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=c.hidden_size, intermediate_size=c.intermediate_size, num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim,
            vocab_size=c.vocab_size, max_position_embeddings=c.max_position_embeddings, rms_norm_eps=c.rms_norm_eps,
            rope_theta=c.rope_theta, tie_word_embeddings=c.tie_word_embeddings,
        )
    ).eval()  # fmt: skip
    state = {f"{name}.weight": torch.from_numpy(w) for name, w in tiny.weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("length", [1, 7, 300])
def test_logits_are_those_of_transformers(make_tiny, tied, length):
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
