"""llama-perplexity's protocol, and our perplexity of real models against llama.cpp's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from edgelora.base.model import open_base
from edgelora.evaluate.perplexity import nll_of, perplexity, windows
from edgelora.pipeline.parity import llama_cpp_perplexity, parity, text_windows, torch_perplexity

# benchmarks/parity.py runs the 16 of the reference figures with the same code; what F16 rounds of float32 weights is
# noise in so few tokens
CHUNKS = {"stories": 4, "smollm": 1, "gemma": 1}


def test_windows_do_not_overlap_and_their_second_half_is_scored():
    found = windows(range(100, 125), 8)
    assert [w.ids.tolist() for w in found] == [list(range(a, a + 8)) for a in (100, 108, 116)]  # the last token dropped
    assert [w.first for w in found] == [5, 5, 5]
    assert found[0].targets.tolist() == [105, 106, 107]  # 8 - 1 - 8 // 2 of them


def test_bos_replaces_the_first_token_of_each_window():
    assert [w.ids.tolist() for w in windows(range(8), 4, bos=99)] == [[99, 1, 2, 3], [99, 5, 6, 7]]


def test_windows_are_limited():
    assert len(windows(range(100), 8, limit=3)) == 3
    assert windows(range(7), 8) == []
    with pytest.raises(ValueError, match="shorter than one window"):
        perplexity([], lambda w: w.ids)


def test_perplexity_and_its_error_are_those_of_the_formula():
    values = np.array([[1.0, 2.0, 6.0], [0.5, 0.5, 2.0]])
    parts = windows(range(16), 8)
    found = perplexity(parts, lambda w: values[0] if w is parts[0] else values[1])
    assert found.n_tokens == 6
    assert found.value == pytest.approx(math.exp(2.0))
    assert found.error == pytest.approx(math.exp(2.0) * values.std(ddof=1) / math.sqrt(6))


def test_nll_survives_large_logits():
    logits = np.array([[1000.0, 0.0], [0.0, -1000.0]], np.float32)
    assert nll_of(logits, np.array([1, 0])).tolist() == [1000.0, 0.0]


def test_both_models_score_the_same_windows(tiny):
    base = open_base(tiny.path)
    parts = text_windows(base, "turn the kitchen lights on, please\n" * 40, 64, 3)
    assert len(parts) == 3
    torch.set_num_threads(1)
    ours, theirs = torch_perplexity(base, parts), llama_cpp_perplexity(tiny.path, parts, exact=True)
    assert ours.value == pytest.approx(theirs.value, rel=1e-4)
    assert ours.error == pytest.approx(theirs.error, rel=1e-3)


@pytest.mark.parametrize("name", ["stories", pytest.param("smollm", marks=pytest.mark.real),
                                  pytest.param("gemma", marks=pytest.mark.real)])  # fmt: skip
def test_perplexity_of_real_models_is_llama_cpps(request, shared_data, name):
    path = request.getfixturevalue(name)
    text = (shared_data / "evals" / "wikitext-2-raw.test.txt").read_bytes().decode("utf-8")  # line ends are tokens
    found = parity(path, text, chunks=CHUNKS[name])
    assert abs(found.against_f16) <= 1e-3  # over the blocks, against llama.cpp without rounded activations
    assert abs(found.against_file) <= 1.5e-2


def test_the_text_is_cut_as_llama_perplexity_cuts_it(stories):
    """One newline at the end removed, BOS in the place of each window's first token."""
    base = open_base(stories)
    text = "Once upon a time there was a little girl. " * 60 + "\n\n"
    (first, second) = text_windows(base, text, 128, 2)
    ids = base.tokenizer.encode(text[:-1]).ids
    bos = base.tokenizer.bos_id
    assert first.ids.tolist() == [bos, *ids[:127]]
    assert second.ids.tolist() == [bos, *ids[128:255]]
