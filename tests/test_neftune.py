"""NEFTune's noise in packed rows: as strong as in the sequence alone, and where HF's hook has it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_architectures import CASES, SIZES, TEMPLATE, ids, seeded
from transformers.integrations.neftune import activate_neftune

from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.data.encode import Example
from edgelora.data.pack import pack, unshared
from edgelora.training.neftune import neftune

ALPHA, D = 7.0, SIZES["hidden_size"]


def example(n_shared, n_own, seed):
    """What begins as all others do; learned from its third own token on."""
    own = np.random.default_rng(seed).integers(300, 500, n_own)
    tokens = np.concatenate([np.arange(10, 10 + n_shared), own])
    return Example(tokens, np.arange(len(tokens)) >= n_shared + 2)


def strengths(decoder, batch):
    """The largest of the noise on each token (T,), of 256 numbers that are uniform within its bound."""
    seen = []

    def noise(x, *lengths, **more):
        noisy = neftune(x, *lengths, alpha=ALPHA, generator=torch.Generator().manual_seed(0), **more)
        seen.append((noisy - x).abs().amax(1))
        return noisy

    decoder.noise = noise
    decoder(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.positions), list(batch.segment_starts),
            batch.prefix)  # fmt: skip
    return seen[0]


def bounds(*parts):
    """(number of tokens, length of their sequence) → α/√(L·d) of each token."""
    return torch.cat([torch.full((n,), ALPHA / (length * D) ** 0.5) for n, length in parts])


def require_bounds(found, *parts):
    assert len(found) == sum(n for n, _ in parts)
    share = found / bounds(*parts)
    assert float(share.max()) <= 1.001
    assert float(share.min()) > 0.9  # 0.9^256 is 2e-12


def test_a_sequence_has_the_noise_it_has_alone_wherever_it_is_packed(tiny):
    decoder = build_decoder(open_base(tiny.path))
    rows = [example(100, n, seed) for seed, n in enumerate((10, 30, 8))]
    require_bounds(strengths(decoder, pack(rows[:1])), (110, 110))
    require_bounds(strengths(decoder, unshared(pack(rows))), (110, 110), (130, 130), (108, 108))
    # what all begin with has that of the shortest
    packed = pack(rows)
    assert packed.prefix == 100
    require_bounds(strengths(decoder, packed), (100, 108), (10, 110), (30, 130), (8, 108))


def drawn_by_hook(model):
    """Where what HF's hook adds to embeddings is kept, so that another model can be given it."""
    embedding, before, drawn = model.get_input_embeddings().train(), [], []
    embedding.register_forward_hook(lambda _module, _input, output: before.append(output))
    activate_neftune(model, ALPHA)
    embedding.register_forward_hook(lambda _module, _input, output: drawn.append(output[0] - before[0][0]))
    return drawn


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "granite"])
def test_noise_is_added_where_transformers_adds_it(tmp_path, vocabulary, write_tokenizer, name):
    """Gemma multiplies its embeddings before it, Granite behind it."""
    model = seeded(CASES[name])
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path, vocabulary, TEMPLATE)
    decoder = build_decoder(open_base(tmp_path))
    drawn, row = drawn_by_hook(model), ids(31)
    with torch.no_grad():
        wanted = model(row[None]).logits[0]  # (T, V)
    plain = decoder.logits(row)
    decoder.noise = lambda x, *_, **__: x + drawn[0]
    torch.testing.assert_close(decoder.logits(row), wanted, atol=1e-5, rtol=1e-5)
    assert float((wanted - plain).abs().max()) > 0.01
