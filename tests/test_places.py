"""Gradients of small parameters stay where they were before the first step (training/places.py)."""

from __future__ import annotations

import torch
from torch import nn

from edgelora.training.places import SMALL, keep_gradients


def parameters() -> list[nn.Parameter]:
    """Two small ones, and a large one."""
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(size)) for size in (30, 7, SMALL // 4 + 1)]


def losses(given: list[nn.Parameter], reached: int) -> torch.Tensor:
    return sum(((i + 1) * one.square()).sum() for i, one in enumerate(given[:reached]))


def test_gradients_are_what_they_were_and_small_ones_stay_in_place():
    plain, kept = parameters(), parameters()
    keep_gradients(kept)
    places: list[set[int]] = [set() for _ in kept]
    for _ in range(3):
        for micro_batch in range(3):
            for given in (plain, kept):
                (losses(given, 3) * (micro_batch + 1)).backward()
        for i, (one, other) in enumerate(zip(plain, kept, strict=True)):
            assert torch.equal(one.grad, other.grad)
            places[i].add(other.grad.data_ptr())
        for one in (*plain, *kept):
            one.grad = None
        places_between = [torch.empty_like(one) for one in kept]  # takes what was let go
        del places_between
    assert [len(one) for one in places[:2]] == [1, 1]


def test_what_a_step_does_not_reach_has_no_gradient():
    """An optimizer leaves it alone then: of a mixture, the experts that no token chose."""
    kept = parameters()
    keep_gradients(kept)
    losses(kept, 2).backward()
    for one in kept:
        one.grad = None
    losses(kept, 1).backward()
    assert kept[0].grad is not None
    assert kept[1].grad is None


def test_a_gradient_that_was_put_back_is_added_to():
    """As when a run goes on in the midst of a step."""
    kept = parameters()
    keep_gradients(kept)
    before = torch.ones(30)
    kept[0].grad = before.clone()
    losses(kept, 1).backward()
    torch.testing.assert_close(kept[0].grad, before + 2 * kept[0].detach())
