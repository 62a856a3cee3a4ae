"""Trade a little arithmetic for a lot of memory: save how a tensor was made instead of the tensor."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def recomputed(value: Tensor, make: Callable[[], Tensor]) -> AbstractContextManager[None]:
    """Whatever saves `value` for its backward inside this block saves `make` instead, which must give it again.

    Everything that `make` holds stays alive in place of `value`, so it pays where those tensors are saved anyway.
    """

    # autograd keeps the hooks as long as the graph: they must not hold `value` itself
    address, shape = value.data_ptr(), value.shape

    def pack(saved: Tensor) -> Any:
        return make if saved.data_ptr() == address and saved.shape == shape else saved

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
