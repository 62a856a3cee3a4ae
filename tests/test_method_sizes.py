"""What each method trains, counted by its paper's formula, which is written out here by hand for the tiny model."""

from __future__ import annotations

import pytest

from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.config import TrainConfig
from edgelora.peft.inject import inject
from edgelora.peft.methods import METHODS
from edgelora.peft.targets import EVERYWHERE, Where
from edgelora.peft.virtual_settings import VirtualTokens
from edgelora.training.adapter_footprint import optimizer_bytes
from edgelora.training.base_footprint import Model

# The tiny model: layers, width, feed-forward width, width of k and v, tokens; one matrix for embedding and head.
L, D, F, KV, V = 2, 256, 512, 128, 512
MATRICES = 7 * L
OUTS = L * (D + KV + KV + D + F + F + D)  # Σ d_out, of q k v o gate up down
INS = L * (D + D + D + D + D + D + F)  # Σ d_in
WEIGHTS = L * (2 * D * D + 2 * D * KV + 3 * D * F)  # Σ d_out d_in
NORMS = (2 * L + 1) * D
R, TOKENS, VIRTUAL = 4, (3, 77, 500), 5
LORA = R * (OUTS + INS)

FORMULAS = {
    "lora": LORA,  # r (d_in + d_out)
    "rslora": LORA,
    "loraplus": LORA,
    "dora": LORA + OUTS,  # and the length of each row
    "pissa": LORA,
    "olora": LORA,
    "loftq": LORA,
    "lora_xs": MATRICES * R * R,  # r²
    "lorma": 2 * R * OUTS,  # r (d_out + d_out)
    "lorma_pi": 2 * R * OUTS,
    "replora": LORA
    + MATRICES * (3 * R * R + 2 * R),  # and P (r, r), and a hidden layer (r, r) and (r,) for A and for B
    "multilora": LORA + 3 * OUTS,  # and a factor for each row, of each of the three parallel LoRAs
    "vera": OUTS + MATRICES * R,  # d_out + r; A and B are drawn, and shared
    "dylora": LORA,
    "adalora": 3 * R // 2 * (OUTS + INS + MATRICES),  # r (d_in + d_out + 1), at first with 1.5 r
    "alora": LORA,
    "longlora": LORA + NORMS + V * D,  # and the norms and the embedding
    "full": WEIGHTS + NORMS + V * D,
    "galore": WEIGHTS + NORMS + V * D,
    "lors": LORA,
    "glora": 2 * LORA,  # one that is added, one that multiplies; biases where a layer has one
    "ia3": L * (KV + KV + F),  # rows of k and v, columns of down
    "bitfit": OUTS,
    "layernorm": NORMS,
    "houlsby": 2 * L * (2 * R * D + D + R),  # 2 m d + d + m, behind attention and behind the feed-forward
    "molora": LORA + 4 * INS,  # and a router of four experts
    "token_rows": len(TOKENS) * D,
    "prompt_tuning": VIRTUAL * D,
    "p_tuning": VIRTUAL * D + 3 * (D * D + D),  # the embeddings, and an MLP of three layers of their width
    "prefix_tuning": VIRTUAL * L * 2 * KV,  # a key and a value in each layer
}
WHERE = {
    "token_rows": Where(token_indices=TOKENS),
    **{name: Where(virtual=VirtualTokens(VIRTUAL)) for name, row in METHODS.items() if row.before is not None},
}


@pytest.fixture(scope="module")
def base(tiny):
    return open_base(tiny.path)


def test_the_formulas_are_those_of_this_model(base):
    config = base.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (L, D, F)
    assert (config.num_key_value_heads * config.head_dim, config.vocab_size) == (KV, V)
    assert config.tie_word_embeddings
    assert FORMULAS.keys() == METHODS.keys()


@pytest.mark.parametrize("method", METHODS)
def test_as_many_numbers_are_trained_as_its_papers_formula_says(base, method):
    parameters = inject(build_decoder(base), method, R, 6.0, seed=0, targets=WHERE.get(method, EVERYWHERE))
    assert sum(parameter.numel() for parameter in parameters) == FORMULAS[method]


def test_galore_keeps_moments_of_the_projections_alone(base, tmp_path):
    """m r + 2 n r of each matrix (m, n), m ≤ n, where Adam keeps 2 m n (arXiv:2403.03507, section 4.1 and table 1)."""
    sides = L * [(D, D), (KV, D), (KV, D), (D, D), (D, F), (D, F), (D, F)]
    projected = sum(m * R + 2 * n * R for m, n in sides)
    config = TrainConfig(base=base.path, data=tmp_path, out="-", method="galore", rank=R)
    assert optimizer_bytes(Model.of(base), config) == 4 * (projected + 2 * NORMS + 2 * V * D)
    plain = config.model_copy(update={"method": "full", "optimizer": "adamw"})
    assert optimizer_bytes(Model.of(base), plain) == 4 * 2 * FORMULAS["full"]
