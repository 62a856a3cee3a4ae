"""Packing: the loss of packed rows is that of the rows alone, and no row is lost, doubled or seen by its neighbour."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.data.encode import Example
from edgelora.data.pack import IGNORE, _fitted, best_fit, pack
from edgelora.peft.inject import inject

quick = settings(max_examples=50, deadline=None)
lengths = st.lists(st.integers(2, 30), min_size=1, max_size=20)


def example(length, number=0, learned=None):
    """`length` random ids, the first of them `number`; all but the first learned unless `learned` says which."""
    ids = np.random.default_rng(number).integers(3, 512, length)
    ids[0] = number
    mask = np.arange(length) > 0
    if learned is not None:
        mask = np.isin(np.arange(length), learned)
    return Example(ids, mask)


def rows_of(batches):
    """The examples inside batches again, as tuples of ids."""
    return [
        tuple(b.input_ids[first:last])
        for b in batches
        for first, last in zip(b.segment_starts[:-1], b.segment_starts[1:], strict=True)
    ]


# -- the loss -----------------------------------------------------------------------------------------------------


@pytest.fixture
def lora_decoder(tiny):
    """The tiny model with LoRA on it, B random so that A has a gradient too."""
    decoder = build_decoder(open_base(tiny.path))
    parameters = inject(decoder, "lora", rank=4, alpha=8, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return decoder, parameters


def batch_loss(decoder, batch):
    """Sum of −log p over the tokens of `batch` that are learned, each times its weight."""
    ids, positions = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.positions)
    hidden = decoder(ids, positions, list(batch.segment_starts), batch.prefix)
    labels = torch.from_numpy(batch.labels)
    learned = labels != IGNORE
    nll = decoder.nll(hidden[learned], labels[learned])
    return (nll if batch.weights is None else nll * torch.from_numpy(batch.weights)[learned]).sum()


def loss_and_gradients(decoder, parameters, batches):
    loss = sum(batch_loss(decoder, b) for b in batches)
    return loss.detach(), torch.autograd.grad(loss, parameters)


def test_packed_loss_and_gradients_are_those_of_the_rows_alone(lora_decoder):
    examples = [example(n, i) for i, n in enumerate((17, 2, 40, 9))]
    alone, wanted = loss_and_gradients(*lora_decoder, [pack([e]) for e in examples])
    for batches in ([pack(examples)], best_fit(examples, 42)):  # one packed row, and two
        packed, found = loss_and_gradients(*lora_decoder, batches)
        torch.testing.assert_close(packed, alone, atol=0, rtol=1e-5)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)


def test_packed_loss_and_gradients_of_weighted_rows_are_those_of_the_rows_alone(lora_decoder):
    draw = np.random.default_rng(3)
    plain = [example(n, learned=range(n // 2, n)) for n in (17, 9, 40)]
    plain[1].input_ids[6:] = draw.integers(3, 512, 3)
    # the first is not weighted, so that both kinds lie in a row; all begin alike, so that there is a shared prefix
    weights = [None, *(draw.choice([0.25, 1.0, 3.0], len(e)).astype(np.float32) * e.loss_mask for e in plain[1:])]
    examples = [replace(e, weights=w) for e, w in zip(plain, weights, strict=True)]
    alone, wanted = loss_and_gradients(*lora_decoder, [pack([e]) for e in examples])
    batches = [pack(examples)]
    assert batches[0].prefix > 0
    packed, found = loss_and_gradients(*lora_decoder, batches)
    torch.testing.assert_close(packed, alone, atol=0, rtol=1e-5)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)
    unweighted, _ = loss_and_gradients(*lora_decoder, [pack(plain)])
    assert abs(float(unweighted - packed)) > 1


def test_a_weight_of_two_counts_as_two_rows(lora_decoder):
    decoder, _ = lora_decoder
    e = example(20, learned=range(10, 20))
    twice = pack([replace(e, weights=2 * e.loss_mask.astype(np.float32))])
    assert float(batch_loss(decoder, twice).detach()) == pytest.approx(
        float(batch_loss(decoder, pack([e, e])).detach()), rel=1e-5
    )
    assert twice.loss_weight == pack([e, e]).loss_weight == pack([e, e]).n_loss_tokens == 20


def test_only_learned_tokens_count(lora_decoder):
    decoder, _ = lora_decoder
    whole, half = example(20), example(20, learned=range(10, 20))
    first = example(20, learned=range(1, 10))
    losses = [float(batch_loss(decoder, pack([e])).detach()) for e in (whole, half, first)]
    assert losses[0] == pytest.approx(losses[1] + losses[2], rel=1e-5)
    assert losses[1] > 0


# -- what a packed row holds --------------------------------------------------------------------------------------


def test_pack_lays_examples_end_to_end():
    a = Example(np.array([10, 11, 12, 13]), np.array([False, False, True, True]))
    b = Example(np.array([20, 21, 22]), np.array([False, True, False]))
    row = pack([a, b])
    assert row.input_ids.tolist() == [10, 11, 12, 13, 20, 21, 22]
    assert row.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert row.segment_starts == (0, 4, 7)
    assert row.labels.tolist() == [IGNORE, 12, 13, IGNORE, 21, IGNORE, IGNORE]
    assert row.n_loss_tokens == 3


@quick
@given(lengths)
def test_labels_are_the_next_token_and_end_with_each_segment(given_lengths):
    row = pack([example(n, i) for i, n in enumerate(given_lengths)])
    for first, last in zip(row.segment_starts[:-1], row.segment_starts[1:], strict=True):
        assert row.labels[first : last - 1].tolist() == row.input_ids[first + 1 : last].tolist()
        assert row.labels[last - 1] == IGNORE
    assert row.n_loss_tokens == sum(given_lengths) - len(given_lengths)


def test_a_learned_first_token_has_nothing_to_follow():
    assert pack([example(3, learned=[0])]).labels.tolist() == [IGNORE] * 3


def test_weights_stand_beside_the_labels():
    a = Example(np.array([10, 11, 12, 13]), np.array([False, False, True, True]), None, np.float32([0, 0, 0.5, 2]))
    b = Example(np.array([10, 21, 22]), np.array([False, True, False]))
    row = pack([a, b])
    assert row.labels.tolist() == [IGNORE, 12, 13, IGNORE, 21, IGNORE, IGNORE]
    assert row.weights.tolist() == [0, 0.5, 2, 0, 1, 0, 0]
    assert (row.weights.dtype, row.n_loss_tokens, row.loss_weight) == (np.float32, 3, 3.5)
    assert pack([b]).weights is None
    assert pack([b]).loss_weight == 1


# -- best fit -----------------------------------------------------------------------------------------------------


@quick
@given(lengths, st.integers(2, 40))
def test_best_fit_keeps_the_budget_and_loses_nothing(given_lengths, budget):
    examples = [example(n, i) for i, n in enumerate(given_lengths)]
    batches = best_fit(examples, budget)
    assert sorted(rows_of(batches)) == sorted(tuple(e.input_ids) for e in examples)
    for batch in batches:
        assert len(batch.input_ids) <= budget or len(batch.segment_starts) == 2  # a long row stays alone


@quick
@given(lengths, st.integers(2, 40))
def test_best_fit_is_deterministic(given_lengths, budget):
    examples = [example(n, i) for i, n in enumerate(given_lengths)]
    assert rows_of(best_fit(examples, budget)) == rows_of(best_fit(examples, budget))


def test_best_fit_fills_the_fullest_row_that_has_room():
    batches = best_fit([example(n) for n in (6, 2, 5, 3, 4)], 10)
    # 6 | 6, 5 | 6+4, 5 | 6+4, 5+3 | 6+4, 5+3+2
    assert [np.diff(b.segment_starts).tolist() for b in batches] == [[6, 4], [5, 3, 2]]


def slow_best_fit(sizes, room):
    """The plain definition, which asks every row."""
    rows, free = [], []
    for number in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fits = [i for i, left in enumerate(free) if left >= sizes[number]]
        best = min(fits, key=lambda i: free[i], default=len(rows))
        if best == len(rows):
            rows.append([])
            free.append(room)
        rows[best].append(number)
        free[best] -= sizes[number]
    return rows


@quick
@given(lengths, st.integers(2, 60))
def test_best_fit_is_best_fit(given_lengths, budget):
    batches = best_fit([example(n, i) for i, n in enumerate(given_lengths)], budget)
    assert [[ids[0] for ids in rows_of([b])] for b in batches] == slow_best_fit(given_lengths, budget)


def test_best_fit_of_many_rows_asks_few_of_them():
    """20,000 rows: asking every open row, as `slow_best_fit` does, would be 60 million comparisons."""
    asked = 0

    class Size(int):
        def __lt__(self, other):
            nonlocal asked
            asked += 1
            return int(self) < int(other)

        def __rsub__(self, other):
            return Size(int(other) - int(self))

        def __sub__(self, other):
            return Size(int(self) - int(other))

    sizes = [Size(n) for n in np.random.default_rng(0).integers(50, 500, 20_000)]
    rows = _fitted(sizes, Size(1000))
    assert sorted(i for row in rows for i in row) == list(range(20_000))
    assert asked < 20_000 * 60  # a few times log2 of the rows
    assert sum(map(int, sizes)) / (1000 * len(rows)) > 0.99  # and hardly a token of room is left


def test_rows_fill_micro_batches_of_the_budget():
    batches = best_fit([example(10, i) for i in range(8)], 25)
    assert [len(b.input_ids) for b in batches] == [20, 20, 20, 20]  # two rows of 10 in each 25
