"""Gradients of small parameters lie in memory that was theirs before the first step.

Made in the midst of a pass, they lie between activations that are freed around them, and the holes are too small for
the next row's, which is a little longer: the heap of a DoRA grew to 1.3 times what it held.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

SMALL = 1 << 20  # bytes: what is larger leaves large holes


class Place:
    """A hook of a parameter that moves each new gradient into memory of its own. Without one it still has None."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.memory = torch.empty_like(parameter)

    def __call__(self, parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is not None and grad.data_ptr() != self.memory.data_ptr():
            parameter.grad = self.memory.copy_(grad)


def keep_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give the gradients of small parameters on a CPU their places."""
    for parameter in parameters:
        if _is_small(parameter):
            parameter.register_post_accumulate_grad_hook(Place(parameter))  # type: ignore[no-untyped-call]


def _is_small(parameter: nn.Parameter) -> bool:
    return parameter.device.type == "cpu" and parameter.nbytes <= SMALL
