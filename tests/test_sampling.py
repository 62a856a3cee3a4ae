"""Sampling: llama.cpp's own tokens for the same seed, distributions as numpy has them, and nothing unchecked in C."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest

from edgelora.errors import ConfigError, EngineError
from runtime.binding import Context, Entry, Model, SamplerChain
from runtime.limits import LIMITS
from runtime.lookup import Lookup
from runtime.sampling import Sampler, log_probabilities
from runtime.service import Sampling

C = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
internals = pytest.importorskip("llama_cpp._internals")


@pytest.fixture(scope="module")
def model(tiny):
    model = Model(tiny.path)
    yield model
    model.close()


@pytest.fixture
def context(model):
    context = Context(model, n_ctx=128, n_sequences=1, threads=1)
    yield context
    context.close()


@pytest.fixture
def rows(model):
    """200 rows of logits, peaked as a model's are."""
    return np.random.default_rng(0).normal(0, 3, (200, model.n_vocab)).astype(np.float32)


def drawn(model, sampling, rows, prompt=()):
    sampler = Sampler.of(model, sampling, n_ctx=64, prompt=prompt)
    tokens = []
    for row in rows:
        tokens.append(sampler.pick(row))
        sampler.accept(tokens[-1])
    sampler.close()
    return tokens


# Each beside the chain that llama-cpp-python's own wrapper makes of it, in the order of common/sampling.cpp.
ORACLES = {
    "temperature": (Sampling(temperature=0.8, seed=7), [("temp", 0.8), ("dist", 7)]),
    "truncated": (
        Sampling(temperature=1.3, top_k=40, top_p=0.9, min_p=0.02, seed=3),
        [("top_k", 40), ("top_p", 0.9, 0), ("min_p", 0.02, 0), ("temp", 1.3), ("dist", 3)],
    ),
    "penalties": (
        Sampling(temperature=1, repeat_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, penalty_last_n=8),
        [("penalties", 512, 8, 1.3, 0.2, 0.5), ("temp", 1.0), ("dist", 0)],
    ),
    "xtc": (
        Sampling(temperature=1, xtc_probability=0.5, xtc_threshold=0.05, seed=5),
        [("xtc", 0.5, 0.05, 0, 5), ("temp", 1.0), ("dist", 5)],
    ),
    "mirostat 1": (
        Sampling(temperature=0.9, mirostat=1, mirostat_tau=3, seed=5),
        [("temp", 0.9), ("mirostat", 512, 5, 3.0, 0.1, 100)],
    ),
    "mirostat 2": (
        Sampling(temperature=0.9, mirostat=2, mirostat_eta=0.3, seed=5),
        [("temp", 0.9), ("mirostat_v2", 5, 5.0, 0.3)],
    ),
}


@pytest.mark.parametrize("name", ORACLES)
def test_the_tokens_are_llama_cpps_own(model, context, name):
    """llama_sampler_sample reads the context's logits itself; ours are given the same row."""
    sampling, steps = ORACLES[name]
    oracle = internals.LlamaSampler()
    for step, *arguments in steps:
        getattr(oracle, f"add_{step}")(*arguments)
    sampler = Sampler.of(model, sampling, n_ctx=64)
    ours, theirs, token = [], [], 5
    for position in range(40):
        row = context.decode([Entry(token, position, 0, True)])[0]
        theirs.append(C.llama_sampler_sample(oracle.sampler, context.handle, -1))
        ours.append(sampler.pick(row))
        sampler.accept(ours[-1])
        token = theirs[-1]
    assert ours == theirs
    assert len(set(ours)) > 10
    sampler.close()
    oracle.close()


def test_greedy_is_the_largest_logit_whatever_is_cut_off(model, rows):
    expected = rows.argmax(axis=1).tolist()
    assert drawn(model, Sampling(), rows) == expected
    assert drawn(model, Sampling(top_k=5, top_p=0.5, min_p=0.3), rows) == expected
    assert drawn(model, Sampling(temperature=1, top_k=1), rows) == expected
    assert drawn(model, Sampling(logit_bias={7: 0.0}), rows) == expected  # the same through C


def test_draws_follow_the_softmax(model):
    row = np.full(model.n_vocab, -30, np.float32)
    row[[3, 50, 400]] = [1.0, 0.0, 2.0]
    counts = np.bincount(drawn(model, Sampling(temperature=0.7, seed=1), [row] * 4000), minlength=model.n_vocab)
    expected = np.exp(row / 0.7) / np.exp(row / 0.7).sum() * 4000
    chosen = [3, 50, 400]
    # chi-squared with 2 degrees of freedom: 13.8 in one seed of a thousand
    assert ((counts[chosen] - expected[chosen]) ** 2 / expected[chosen]).sum() < 13.8
    assert counts[chosen].sum() == 4000


def test_the_seed_decides(model, rows):
    same, other = Sampling(temperature=1, seed=1), Sampling(temperature=1, seed=2)
    assert drawn(model, same, rows) == drawn(model, same, rows) != drawn(model, other, rows)


def penalized(row, past, s):
    """The penalties in numpy (common/sampling.cpp's order: repetition, then frequency and presence)."""
    z = row.astype(np.float64)
    for token, n in zip(*np.unique(past[-s.penalty_last_n :], return_counts=True), strict=True):
        z[token] = z[token] * s.repeat_penalty if z[token] <= 0 else z[token] / s.repeat_penalty
        z[token] -= n * s.frequency_penalty + s.presence_penalty
    return z


def test_penalties_count_the_prompt_and_forget(model, rows):
    s = Sampling(repeat_penalty=1.5, frequency_penalty=0.7, presence_penalty=0.3, penalty_last_n=10)
    rows[:, :20] += 8  # the same few tokens are likely again and again
    past = [3, 3, 4, 5]
    found = drawn(model, s, rows, prompt=past)
    for row, token in zip(rows, found, strict=True):
        assert token == penalized(row, past, s).argmax()
        past.append(token)
    assert found != rows.argmax(axis=1).tolist()


def test_minus_one_reaches_back_over_the_whole_context(model):
    row = np.zeros(model.n_vocab, np.float32)
    row[9], row[8] = 5, 4
    prompt = [9, *[1] * 40]
    wide = Sampling(presence_penalty=2, penalty_last_n=-1)
    assert drawn(model, wide, [row], prompt) == [8]
    assert drawn(model, replace(wide, penalty_last_n=20), [row], prompt) == [9]


def test_dry_keeps_a_repetition_from_going_on(model):
    words = [token for token in range(model.n_vocab) if model.piece(token).isalpha()]  # none breaks a repetition
    a, b, c, other, d = words[:5]
    row = np.zeros(model.n_vocab, np.float32)
    row[c], row[other] = 5, 4
    repeating = [a, b, c, d, a, b]
    assert drawn(model, Sampling(dry_multiplier=3), [row], repeating) == [other]
    assert drawn(model, Sampling(dry_multiplier=3, dry_allowed_length=3), [row], repeating) == [c]
    newline = model.tokenize("\n", parse_special=False)
    assert drawn(model, Sampling(dry_multiplier=3), [row], [a, b, c, d, a, *newline, b]) == [c]


def test_xtc_leaves_the_last_of_the_likely(model):
    row = np.full(model.n_vocab, -20, np.float32)
    row[[5, 6, 7]] = [3, 2, 1]  # probabilities 0.67, 0.24, 0.09
    assert drawn(model, Sampling(xtc_probability=1, xtc_threshold=0.2), [row]) == [6]


def test_biases_forbid_and_force(model, rows):
    best = int(rows[0].argmax())
    assert drawn(model, Sampling(logit_bias={best: -math.inf}), rows[:1]) == [int(np.argsort(rows[0])[-2])]
    assert drawn(model, Sampling(temperature=1, logit_bias={11: 1000}), rows) == [11] * len(rows)


def test_a_suppressed_token_is_never_drawn(model, rows, monkeypatch):
    likely = tuple({int(i) for i in rows.argmax(axis=1)})
    monkeypatch.setattr(model, "suppressed", likely)
    assert not set(likely) & set(drawn(model, Sampling(), rows))


def test_picking_leaves_the_row_as_it_is(model, rows):
    before = rows.copy()
    drawn(model, Sampling(temperature=1, top_k=3, repeat_penalty=1.2), rows)
    assert np.array_equal(rows, before)


def test_log_probabilities_are_those_of_the_row(rows):
    row = rows[0]
    exact = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
    logprob, top = log_probabilities(row, 17, 5)
    assert logprob == pytest.approx(exact[17], abs=1e-5)
    assert [token for token, _ in top] == np.argsort(-exact, kind="stable")[:5].tolist()
    assert [value for _, value in top] == pytest.approx(np.sort(exact)[::-1][:5], abs=1e-5)
    assert log_probabilities(row, 17, 0)[1] == ()
    assert math.fsum(math.exp(p) for _, p in log_probabilities(row, 0, 10**6)[1]) == pytest.approx(1)


def test_log_probabilities_are_reported_if_asked_for(model, rows):
    asked = Sampler.of(model, Sampling(temperature=2, logprobs=2), n_ctx=64)
    token = asked.pick(rows[0])
    found = asked.logprob(rows[0], token)
    assert (found.token, found.text, len(found.top)) == (token, model.piece(token), 2)
    assert found.logprob == log_probabilities(rows[0], token, 0)[0]  # of the model, not of temperature 2
    assert Sampler.of(model, Sampling(), n_ctx=64).logprob(rows[0], token) is None


def test_drafts_change_no_greedy_answer(model, context):
    """Over F32 weights: guesses evaluated together and kept as far as they are what the model picks."""
    prompt = [*range(5, 20), *range(5, 15)]

    def answer(n_draft):
        context.clear()
        sampler, lookup = Sampler.of(model, Sampling(repeat_penalty=1.02), n_ctx=128, prompt=prompt), Lookup(prompt)
        due, position, found, decodes = list(prompt), 0, [], 0
        while len(found) < 60:
            draft = lookup.draft(n_draft)
            first = len(due) - 1
            rows = context.decode(
                [Entry(t, position + i, 0, i >= first) for i, t in enumerate([*due, *draft])]
            ).copy()  # fmt: skip
            decodes += 1
            position += len(due)
            for row, guess in zip(rows, [*draft, None], strict=True):
                token = sampler.pick(row)
                sampler.accept(token)
                lookup.extend([token])
                found.append(token)
                if token != guess:
                    break
                position += 1
            context.forget(0, position)
            due = [token]
        sampler.close()
        return found[:60], decodes

    plain, n_plain = answer(0)
    guessed, n_guessed = answer(4)
    assert guessed == plain
    assert n_guessed < n_plain


# -- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIMITS)
def test_every_number_has_limits(model, name):
    low, high = LIMITS[name]
    for value in (low - 1, high * 2 + 1, math.nan, math.inf, -math.inf, "1", None, True):
        if value is None and name == "logprobs":
            continue
        with pytest.raises(ConfigError, match=name):
            Sampler.of(model, replace(Sampling(temperature=1), **{name: value}), n_ctx=64)


def test_every_number_is_in_the_table():
    others = {"logit_bias", "stop", "grammar", "json_schema"}
    assert set(LIMITS) == {f.name for f in fields(Sampling)} - others


@pytest.mark.parametrize(
    "bad",
    [
        {"logit_bias": {512: 1.0}}, {"logit_bias": {-1: 1.0}}, {"logit_bias": {"5": 1.0}},
        {"logit_bias": {5: math.nan}}, {"logit_bias": {5: math.inf}}, {"logit_bias": {5: "1"}},
        {"logit_bias": {True: 1.0}}, {"logit_bias": [5]}, {"grammar": 5}, {"grammar": ["root"]},
        {"stop": ("",)}, {"stop": "end"}, {"stop": ("x" * 1001,)}, {"stop": ("x",) * 65}, {"stop": (5,)},
        {"mirostat": 2, "temperature": 0.0}, {"grammar": 'root ::= "x"', "json_schema": {}},
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(model, bad):
    with pytest.raises(ConfigError):
        Sampler.of(model, Sampling(**bad), n_ctx=64)


def test_all_faults_come_together(model):
    with pytest.raises(ConfigError) as e:
        Sampler.of(model, Sampling(temperature=-1, top_p=2.0, seed=-1, stop=("",)), n_ctx=64)
    assert str(e.value) == (
        "sampling: temperature is -1, outside 0 to 100; top_p is 2.0, outside 0 to 1; "
        "seed is -1, outside 0 to 4294967294; "
        "a stop string that is not of 1 to 1000 characters\n"
        "  why: llama.cpp does not check these: it would answer noise, ignore them or crash\n"
        "  fix: correct these settings"
    )


@pytest.mark.parametrize("noise", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1)])
def test_logits_that_are_no_numbers_raise(model, noise, sampling):
    row = np.full(model.n_vocab, noise, np.float32)
    with pytest.raises(EngineError, match="not numbers"):
        Sampler.of(model, sampling, n_ctx=64).pick(row)
    row = np.zeros(model.n_vocab, np.float32)
    row[100] = np.nan
    with pytest.raises(EngineError, match="not numbers"):
        Sampler.of(model, sampling, n_ctx=64).pick(row)


def test_a_closed_sampler_raises(model, rows):
    sampler = Sampler.of(model, Sampling(temperature=1), n_ctx=64)
    sampler.close()
    sampler.close()
    with pytest.raises(EngineError, match="closed sampler"):
        sampler.pick(rows[0])


def test_a_chain_that_picks_nothing_raises(model, rows):
    chain = SamplerChain(model)
    with pytest.raises(EngineError, match="picked no token"):
        chain.pick(model.candidates.fill(rows[0]))
    chain.close()
