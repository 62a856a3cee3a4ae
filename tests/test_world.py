"""One process alone computes on the card that was asked for."""

from __future__ import annotations

import pytest
import torch

from edgelora.training.world import Alone


@pytest.mark.parametrize(("device", "cards"), [("cuda:1", [1]), ("cuda", [3]), ("cpu", []), ("mps", [])])
def test_it_computes_on_the_card_that_was_asked_for(monkeypatch, device, cards):
    """Triton's kernels are launched on the card that torch computes on, wherever their tensors are."""
    used = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    Alone().use(device)
    assert used == cards
