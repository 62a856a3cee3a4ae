"""BitFit (arXiv:2106.10199): y = x Wᵀ + c + b. Only biases are trained, of all linear layers, whether they had one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgelora.nn.linear import Weight, product
from edgelora.peft.defaults import Defaults, always

DEFAULTS = Defaults(
    rate=always(1e-3, "the authors' for biases, over BERT (arXiv:2106.10199, github.com/benzakenelad/BitFit)")
)


class BiasDelta(nn.Module):
    """`bias` (d_out,) float32, beside the bias that the layer may have."""

    factors = None

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor, weight: Weight) -> Tensor:
        return product(x, weight)

    def of_bias(self, bias: Tensor | None) -> Tensor:
        return self.bias if bias is None else bias + self.bias

    def tensors(self) -> dict[str, Tensor]:
        return {"bias": self.bias.detach()}


def fresh(weight: Weight, *_: object) -> BiasDelta:
    """Zero: it does nothing yet."""
    return BiasDelta(torch.zeros(weight.shape[0]))
