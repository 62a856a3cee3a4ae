"""IA³ (arXiv:2205.05638): k and v are multiplied by l_k and l_v, what goes into down_proj by l_ff.

    y = l ∘ (x Wᵀ + c), l (d_out,)   for k_proj and v_proj        y = (l ∘ x) Wᵀ + c, l (d_in,)   for down_proj

A family whose q, k and v are one matrix has l (d_out,) for all of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edgelora.nn.linear import Linear, Weight, product
from edgelora.nn.scaled import scaled
from edgelora.peft.defaults import Defaults, always

FEED_FORWARD = "down_proj"
TARGETS = ("k_proj", "v_proj", "qkv_proj", FEED_FORWARD)
DEFAULTS = Defaults(
    rate=always(3e-3, "T-Few's for an IA3, over T0 with Adafactor (arXiv:2205.05638, github.com/r-three/t-few)")
)


class Ia3Delta(nn.Module):
    """ia3_l (d_out, 1), which multiplies what comes out, or (1, d_in), what goes in: as PEFT has it."""

    factors = None

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.ia3_l = nn.Parameter(values)

    def forward(self, x: Tensor, weight: Weight) -> Tensor:
        if len(self.ia3_l) == 1:
            return product(scaled(x, self.ia3_l[0]), weight)
        return scaled(product(x, weight), self.ia3_l[:, 0])

    def of_bias(self, bias: Tensor | None) -> Tensor | None:
        return bias if bias is None or len(self.ia3_l) == 1 else bias * self.ia3_l[:, 0]

    def tensors(self) -> dict[str, Tensor]:
        return {"ia3_l": self.ia3_l.detach()}


def shapes(module: str, d_out: int, d_in: int) -> tuple[tuple[int, int], ...]:
    """Of what is trained for one linear layer, by its name."""
    return ((1, d_in),) if module.endswith(FEED_FORWARD) else ((d_out, 1),)


def of_layer(module: str, linear: Linear) -> Ia3Delta:
    """Ones: it does nothing yet."""
    (shape,) = shapes(module, *linear.weight.shape)
    return Ia3Delta(torch.ones(shape))


def feed_forward(_: object, targets: Sequence[str]) -> dict[str, object]:
    """PEFT's setting that says of which layers the input is multiplied."""
    return {"feedforward_modules": [name for name in targets if name.endswith(FEED_FORWARD)]}


def fresh(weight: Weight, *_: object) -> Ia3Delta:
    """For a layer that is not a feed-forward one."""
    return Ia3Delta(torch.ones(weight.shape[0], 1))
