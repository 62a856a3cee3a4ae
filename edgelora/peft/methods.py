"""THE TABLE of methods: what each trains and which doors lead out of it (DESIGN: exits)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from edgelora.nn.linear import Delta
from edgelora.peft import lora


@dataclass(frozen=True)
class Method:
    """A way to adapt a linear layer. `fresh(shape, rank, alpha, generator)` makes its trainable half."""

    name: str
    paper: str
    trains: str
    exits: tuple[str, ...]
    fresh: Callable[[tuple[int, int], int, float, torch.Generator], Delta]


METHODS: dict[str, Method] = {
    "lora": Method(
        name="lora",
        paper="arXiv:2106.09685",
        trains="A (r, d_in) and B (d_out, r) for each linear layer",
        exits=("adapter", "merged"),
        fresh=lora.fresh,
    ),
}
