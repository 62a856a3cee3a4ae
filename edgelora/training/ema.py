"""A moving average of the trained weights (Polyak averaging): what is kept and evaluated where `ema_decay` is set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """θ̄ = Σ dᵗ⁻ⁱ θᵢ / Σ dᵗ⁻ⁱ over the weights θᵢ after each step: the start, where B is zero, is not part of it."""

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.parameters = dict(named_parameters)
        self.averages = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now, after a step."""
        self.steps += 1
        newest = (1 - self.decay) / (1 - self.decay**self.steps)  # 1 at the first step
        for name, parameter in self.parameters.items():
            self.averages[name].lerp_(parameter.detach(), newest)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """In here the parameters hold the averages: evaluate, collect or save, but do not train."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.averages[name] = self.averages[name], parameter.data

    def state(self) -> dict[str, Tensor]:
        """The averages by their parameters' names, and `steps` (0-d int64): the tensors themselves, no copies."""
        return {**self.averages, "steps": torch.tensor(self.steps)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back, bit for bit, what `state` gave."""
        self.steps = int(tensors["steps"])
        for name, average in self.averages.items():
            average.copy_(tensors[name])
