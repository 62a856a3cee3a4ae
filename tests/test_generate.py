"""Generation with cached keys and values, against the decoder run anew over the growing sequence and transformers."""

from __future__ import annotations

import pytest
import test_architectures
import torch
from test_architectures import CASES, WINDOW, ids

from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.nn.attention import SegmentAttention
from edgelora.nn.cache import KeyValues
from edgelora.nn.generate import Sampling, Until, generate, growing
from edgelora.nn.layer import Attention
from edgelora.nn.scores import Scores
from edgelora.peft.inject import inject

family = test_architectures.family  # the fixture
PROMPTS = [[5, 9, 200, 31, 17], [7], list(range(40, 70))]


@pytest.fixture(scope="module")
def decoder(tiny):
    torch.set_num_threads(1)
    return build_decoder(open_base(tiny.path))


def loud(decoder, seed=0):
    """The decoder with an adapter that changes what it says."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in inject(decoder, "lora", 4, 8.0, seed):
        parameter.data.normal_(0, 0.3, generator=draw)
    return decoder


# -- the decoder run anew, and transformers -----------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_each_token_is_computed_as_if_the_whole_sequence_were_run_again(family, name):
    """Three sequences, one of which ends on the way; windows slide and lengths pass where a rope turns."""
    decoder = build_decoder(open_base(family(name).folder))
    # dynamic turns at 32 tokens, phi3-long at 256
    lengths = (250 if name == "phi3-long" else 2 * WINDOW - 4, 3, WINDOW + 1)
    whole = [ids(n + 10) for n in lengths]
    expected = [[decoder.logits(w[: n + i])[-1] for i in range(10)] for w, n in zip(whole, lengths, strict=True)]
    alive = [0, 1, 2]
    with torch.no_grad(), growing(decoder, [w[:n].tolist() for w, n in zip(whole, lengths, strict=True)]) as grown:
        for step in range(10):
            theirs = torch.stack([expected[i][step] for i in alive])
            torch.testing.assert_close(grown.next_logits(), theirs, atol=2e-5, rtol=1e-5)
            places = [0, 2] if step == 4 else list(range(len(alive)))
            alive = [alive[place] for place in places]
            grown.grow(places, [int(whole[i][lengths[i] + step]) for i in alive])


@pytest.mark.parametrize("with_adapter", [False, True])
def test_greedy_answers_are_those_of_the_likeliest_token_again_and_again(tiny, with_adapter):
    decoder = build_decoder(open_base(tiny.path))
    if with_adapter:
        loud(decoder)
    answers = generate(decoder, PROMPTS, Until(20))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        sequence = list(prompt)
        for token in answer:
            assert token == int(decoder.logits(torch.tensor(sequence))[-1].argmax())
            sequence.append(token)
        assert len(answer) == 20


def test_greedy_answers_are_those_of_transformers(tiny, decoder, transformers_model):
    theirs = transformers_model(tiny)
    for prompt, ours in zip(PROMPTS, generate(decoder, PROMPTS, Until(24)), strict=True):
        out = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            max_new_tokens=24, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert ours == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_the_last_token_looks_back_as_in_a_whole_segment(window, dtype, atol):
    """Also for the numbers of half the width that a GPU or a new CPU multiplies."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(12, heads, 16, generator=draw).to(dtype) for heads in (6, 2, 2))
    how = Scores(0.25, window, softcap=3.0)
    cache = KeyValues()
    cache.attend(q[:8], k[:8], v[:8], [0, 8], 0, how)
    for last in range(8, 12):
        found = cache.attend(q[last : last + 1], k[last : last + 1], v[last : last + 1], [0, 1], 0, how)
        whole = SegmentAttention.apply(q[: last + 1], k[: last + 1], v[: last + 1], [0, last + 1], 0, how)
        assert found.dtype == dtype
        torch.testing.assert_close(found[0], whole[last], atol=atol, rtol=0)


# -- where an answer ends -----------------------------------------------------------------------------------------


def test_an_answer_ends_behind_a_stop_token_and_the_others_go_on(decoder):
    whole = generate(decoder, PROMPTS, Until(12))
    stop = whole[0][4]
    for before, answer in zip(whole, generate(decoder, PROMPTS, Until(12, {stop})), strict=True):
        assert answer == (before[: before.index(stop) + 1] if stop in before else before)
    assert any(stop not in answer for answer in whole)


def test_an_answer_ends_where_its_sequence_is_full(decoder):
    whole = generate(decoder, PROMPTS, Until(12))
    cut = generate(decoder, PROMPTS, Until(12, max_length=33))
    assert cut == [whole[0], whole[1], whole[2][:3]]
    assert generate(decoder, PROMPTS, Until(0)) == [[], [], []]
    assert generate(decoder, PROMPTS, Until(12, max_length=30)) == [whole[0], whole[1], []]


def test_no_prompts_have_no_answers(decoder):
    assert generate(decoder, [], Until(3)) == []


# -- drawing ------------------------------------------------------------------------------------------------------


def test_tokens_are_drawn_as_often_as_they_are_likely(decoder):
    """1500 first tokens at temperature 1 against softmax; the bound is five standard deviations of the likeliest."""
    prompt, n = PROMPTS[0], 1500
    p = (4 * decoder.logits(torch.tensor(prompt))[-1]).softmax(-1)
    drawn = [generate(decoder, [prompt], Until(1), Sampling(0.25, 1.0, seed))[0][0] for seed in range(n)]
    share = torch.bincount(torch.tensor(drawn), minlength=len(p)) / n
    top = p.topk(5)
    assert (share[top.indices] - top.values).abs().max() < 5 * (top.values * (1 - top.values) / n).sqrt().max()


def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p(decoder):
    prompt = PROMPTS[0]
    p, order = decoder.logits(torch.tensor(prompt))[-1].softmax(-1).sort(descending=True)
    top_p = float(p[:3].sum()) - 1e-4
    drawn = {generate(decoder, [prompt], Until(1), Sampling(1.0, top_p, seed))[0][0] for seed in range(60)}
    assert drawn == set(order[:3].tolist())


def test_an_answer_depends_on_its_seed_and_not_on_its_neighbours(decoder):
    how = Sampling(1.0, 1.0, 7)
    together = generate(decoder, PROMPTS, Until(10), how)
    assert together == [generate(decoder, [prompt], Until(10), how)[0] for prompt in PROMPTS]
    assert together != generate(decoder, PROMPTS, Until(10), Sampling(1.0, 1.0, 8))


# -- the training beside it ---------------------------------------------------------------------------------------


def test_a_training_goes_on_as_if_nobody_had_looked(tiny):
    decoder = loud(build_decoder(open_base(tiny.path)))
    row, positions = torch.tensor(PROMPTS[2]), torch.arange(30)

    def gradients():
        decoder.zero_grad()
        decoder.nll(decoder(row, positions, [0, 30])[:-1], row[1:]).sum().backward()
        return [p.grad.clone() for p in decoder.parameters()]

    before, random = gradients(), torch.get_rng_state()
    generate(decoder, PROMPTS, Until(5), Sampling(1.0))
    assert torch.equal(torch.get_rng_state(), random)
    for ours, theirs in zip(gradients(), before, strict=True):
        assert torch.equal(ours, theirs)


def test_an_interruption_leaves_no_cache_behind(decoder, monkeypatch):
    monkeypatch.setattr(decoder, "logits_of", interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(decoder, PROMPTS, Until(5))
    assert [m for m in decoder.modules() if isinstance(m, Attention) and m.cache is not None] == []


def interrupt(_):
    raise KeyboardInterrupt
