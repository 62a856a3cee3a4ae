"""Adafactor (arXiv:1804.04235) as fine-tuning uses it: factored second moments and clipped updates, the step is given.

torch.optim.Adafactor multiplies each step by the size of its own tensor, as the paper does for training from scratch
(section 8): the B of a LoRA begins at zero and would learn a thousand times too slowly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

DECAY = 0.8  # β2 = 1 − t^−0.8 (section 7.2)
SMALLEST = 1e-30  # ε1 of the paper, added to squared gradients
LARGEST_UPDATE = 1.0  # d of the paper: the root mean square of an update before the learning rate (section 6)


class Adafactor(torch.optim.Optimizer):
    """Keeps n + m numbers for the second moments of an (n, m) matrix, n for a vector, and no first moment."""

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "gradients come from outside"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = _update(parameter.grad, self.state[parameter])
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])


def _update(gradient: Tensor, state: dict[str, Any]) -> Tensor:
    """The gradient over the root of its second moment, its own root mean square held to LARGEST_UPDATE."""
    if not state:
        state["step"] = torch.tensor(0.0)
        for name, shape in _moments(gradient).items():
            state[name] = gradient.new_zeros(shape)
    state["step"] += 1
    newest = float(state["step"]) ** -DECAY  # 1 − β2
    squared = gradient.square().add_(SMALLEST)
    if gradient.dim() == 1:
        update: Tensor = gradient * state["squares"].lerp_(squared, newest).rsqrt()
    else:
        rows = state["row_squares"].lerp_(squared.mean(-1), newest)  # (n,)
        columns = state["column_squares"].lerp_(squared.mean(-2), newest)  # (m,)
        update = gradient * (rows / rows.mean()).rsqrt()[:, None] * columns.rsqrt()
    return update.div_((update.square().mean().sqrt() / LARGEST_UPDATE).clamp_(min=1.0))


def _moments(gradient: Tensor) -> dict[str, tuple[int, ...]]:
    if gradient.dim() == 1:
        return {"squares": tuple(gradient.shape)}
    n, m = gradient.shape
    return {"row_squares": (n,), "column_squares": (m,)}
