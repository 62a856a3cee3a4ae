"""Trade a little arithmetic for a lot of memory: save how a tensor was made instead of the tensor."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


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
