"""Trade arithmetic for memory: save how a tensor was made, not the tensor; or of a whole layer only its input."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_thread = threading.local()


def is_replay() -> bool:
    """Whether what runs is being run again, in a backward pass: what it gives at the end is not read then."""
    return getattr(_thread, "replays", False)


class _Recipe:
    """How to make a tensor that several backward steps in a row ask for: made for the first, dropped after the last."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make
        self._value: Tensor | None = None
        self._asked = self.users = 0

    def get(self) -> Tensor:
        value = self._make() if self._value is None else self._value
        self._asked += 1
        self._value = value if self._asked % self.users else None
        return value


def _layout(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.dtype, x.shape, x.stride()


def recomputed(value: Tensor, make: Callable[[], Tensor]) -> AbstractContextManager[None]:
    """Whatever saves `value` for its backward inside this block saves `make` instead, which must give it again.

    Everything that `make` holds stays alive in place of `value`, so it pays where those tensors are saved anyway.
    """
    if is_replay() and value.is_cuda:
        return nullcontext()  # of one layer alone it would save little there, and cost launches
    # autograd keeps the hooks as long as the graph: they must not hold `value` itself
    same, recipe = _layout(value), _Recipe(make)

    def pack(saved: Tensor) -> Any:
        if _layout(saved) != same:
            return saved
        recipe.users += 1
        return recipe

    def unpack(packed: Any) -> Tensor:
        return packed.get() if isinstance(packed, _Recipe) else packed

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class _Again(torch.autograd.Function):
    """run(x), of which x alone is saved: the backward runs it once more, with a graph of its own.

    Not torch.utils.checkpoint: it sees what is saved through hooks, and those of `recomputed` inside hide it from them.
    """

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.run, ctx.parameters = run, parameters
        return run(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x = ctx.saved_tensors[0].detach().requires_grad_(ctx.needs_input_grad[1])
        inputs = [t for t, needed in zip((x, *ctx.parameters), ctx.needs_input_grad[1:], strict=True) if needed]
        _thread.replays = True
        try:
            with torch.enable_grad():
                y = ctx.run(x)
        finally:
            _thread.replays = False
        found = iter(torch.autograd.grad(y, inputs, grads[0]))
        return None, *(next(found) if needed else None for needed in ctx.needs_input_grad[1:])


def run_again(run: Callable[[Tensor], Tensor], x: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """run(x) with the same gradients, bit for bit, that keeps x alone and is run again in the backward pass.

    `parameters`: whatever else in `run` has a gradient. The same x must give the same result each time.
    """
    return _Again.apply(run, x, *parameters) if torch.is_grad_enabled() else run(x)
