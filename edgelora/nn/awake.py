"""LoRAs that sleep until they are invoked (aLoRA, arXiv:2504.12397): which tokens of a packed row they act on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgelora.nn.linear import Factors, Weight, times, times_transposed

NEVER = 1 << 40  # beyond any position


def last_place(invocation: Sequence[int], ids: np.ndarray) -> int:
    """Where in `ids` (n,) the last `invocation` begins, its first token: PEFT's and llama.cpp's server's rule. NEVER if
    there is none."""
    if len(ids) < len(invocation):
        return NEVER
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(invocation))
    found = np.flatnonzero((windows == np.asarray(invocation)).all(1))
    return int(found[-1]) if len(found) else NEVER


class Awake:
    """From where on the layers of one decoder act, which share it. The decoder tells it of each row before the layers.

    `begins`: where sequences grow, from which position on each of them is awake, its prompt having been seen.
    """

    def __init__(self, invocation: Sequence[int]) -> None:
        self.invocation = tuple(invocation)
        self.begins: list[int] | None = None
        self.rows: Tensor | None = None
        """(T, 1): 1 for the tokens of the row on which they act, 0 for the others. None: no row was seen yet."""

    def shares(self, ids: np.ndarray, starts: Sequence[int], prefix: int) -> bool:
        """Whether the segments of a packed row can share its first `prefix` tokens: those of one that is invoked in
        them are not those of another that is invoked later."""
        return not prefix or _one_way(begins_of(self.invocation, ids, starts, prefix), prefix)

    def see(self, ids: Tensor, positions: Tensor, starts: Sequence[int], prefix: int) -> None:
        """A packed row as `Decoder.forward` takes it; the tokens that segments share must be one way for all of them
        (see `data/pack.py`)."""
        begins = self.begins
        if begins is None:
            begins = begins_of(self.invocation, ids.cpu().numpy(), starts, prefix)
        assert _one_way(begins, prefix)
        of_each = [begins[0]] * prefix
        for begin, (first, last) in zip(begins, itertools.pairwise(starts), strict=True):
            of_each += [begin] * (last - first)
        self.rows = (positions >= torch.tensor(of_each, device=positions.device))[:, None].to(torch.float32)

    def remembered(self, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """`run`, awake as now whenever it runs: what is computed again in a backward pass may be of an earlier row."""
        rows = self.rows

        def again(x: Tensor) -> Tensor:
            self.rows = rows
            return run(x)

        return again


def begins_of(invocation: Sequence[int], ids: np.ndarray, starts: Sequence[int], prefix: int) -> list[int]:
    """The position from which on each segment of a packed row is awake."""
    shared = ids[:prefix]
    return [
        last_place(invocation, np.concatenate([shared, ids[first:last]])) for first, last in itertools.pairwise(starts)
    ]


def _one_way(begins: Sequence[int], prefix: int) -> bool:
    """Whether the first `prefix` tokens, which segments share, sleep and wake alike in all of them."""
    return len({min(begin, prefix) for begin in begins}) <= 1


class AwakeLora(torch.autograd.Function):
    """y = x Wᵀ + s m ∘ (x Aᵀ) Bᵀ: x (T, d_in), W frozen (d_out, d_in), A (r, d_in), B (d_out, r) float32, m (T, 1).

    Saves x, m and m ∘ x Aᵀ (T, r).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, rows: Tensor, scale: float, a: Tensor, b: Tensor) -> Tensor:
        rows = rows.to(x.dtype)
        down = (x @ a.to(x.dtype).T).mul_(rows)
        y = times_transposed(x, weight)
        ctx.save_for_backward(x, rows, down, a, b)
        ctx.weight, ctx.scale = weight, scale
        return y.addmm_(down, b.to(x.dtype).T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, rows, down, a, b) = grads, ctx.saved_tensors
        d_b = (down.T @ dy).T.to(b.dtype).mul_(ctx.scale)
        d_down = (dy @ (b * ctx.scale).to(dy.dtype)).mul_(rows)
        d_a = (d_down.T @ x).to(a.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = times(dy, ctx.weight).addmm_(d_down, a.to(dy.dtype))
        return dx, None, None, None, d_a, d_b


def awake_lora(x: Tensor, weight: Weight, factors: Factors, rows: Tensor) -> Tensor:
    """x Wᵀ + scale m ∘ (x aᵀ) bᵀ."""
    y: Tensor = AwakeLora.apply(x, weight, rows, factors.scale, factors.a, factors.b)
    return y
