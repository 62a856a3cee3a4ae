"""GaLore (arXiv:2403.03507): AdamW over the r largest directions of each matrix's gradient, and moments of that size.

Of G (n, m) with n ≥ m: R = G P (n, r), P (m, r) the right singular vectors of the r largest singular values, found anew
every T steps; W ← W − η α N Pᵀ, N (n, r) what Adam makes of R. Where n < m, P (n, r) is to the left. Moments stay as
they are when P changes, as in the authors' code. Vectors, the embedding and the head learn by plain AdamW, and their
groups come with α η for a rate (`optim.py`; the authors leave it at η).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

EPS = 1e-8


class GaLore(torch.optim.Optimizer):
    """Keeps 2 n r + m r numbers of an (n, m) matrix, n ≥ m, 2 n m of one in a group that is not `projected`, and
    2 n of a vector. `rank` is cut to m; `gap` is T."""

    def __init__(self, params: Iterable[Any], rank: int, scale: float, gap: int, betas: tuple[float, float]) -> None:
        super().__init__(params, {"betas": betas, "projected": True})
        self.rank, self.scale, self.gap = rank, scale, gap

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "gradients come from outside"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        state.setdefault("step", torch.tensor(0.0))
        if gradient.dim() == 1 or not group["projected"]:
            parameter.sub_(_adam(gradient, state, group["betas"]), alpha=group["lr"])
            return
        if int(state["step"]) % self.gap == 0:
            state["projection"] = leading(gradient, self.rank)
        p, tall = state["projection"], gradient.shape[0] >= gradient.shape[1]
        moved = _adam(gradient @ p if tall else p.T @ gradient, state, group["betas"])
        parameter.add_(moved @ p.T if tall else p @ moved, alpha=-group["lr"] * self.scale)


def moments_of(shape: tuple[int, ...], rank: int) -> int:
    """How many numbers are kept of a parameter, projection included; the number of steps aside."""
    if len(shape) == 1:
        return 2 * shape[0]
    n, m = max(shape), min(shape)
    return min(rank, m) * (2 * n + m)


def leading(gradient: Tensor, rank: int) -> Tensor:
    """Orthonormal columns (m, r): the singular vectors, on its shorter side m, of its largest singular values.

    As eigenvectors of the smaller of G Gᵀ and Gᵀ G, in float64 that squares lose nothing: an SVD takes much longer. The
    largest number of each is positive: moments that stay would else depend on a sign that no algorithm promises.
    """
    g = (gradient.cpu() if gradient.device.type == "mps" else gradient).double()  # Metal has no float64
    gram = g.T @ g if g.shape[0] >= g.shape[1] else g @ g.T
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)  # they come with the largest last
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return (vectors * signs).to(gradient.device, gradient.dtype)


def _adam(gradient: Tensor, state: dict[str, Any], betas: tuple[float, float]) -> Tensor:
    """The step that Adam makes of a gradient, before the learning rate (arXiv:1412.6980, algorithm 1)."""
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    state["step"] += 1
    step = float(state["step"])
    mean = state["exp_avg"].lerp_(gradient, 1 - betas[0])
    square = state["exp_avg_sq"].mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    root = (square / (1 - betas[1] ** step)).sqrt_().add_(EPS)
    moved: Tensor = mean / (1 - betas[0] ** step) / root
    return moved
