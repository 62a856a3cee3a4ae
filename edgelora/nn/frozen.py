"""What a decoder is built over: the weights of a base model, however they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edgelora.nn.linear import Linear, Weight


@dataclass(frozen=True)
class Frozen:
    """All weights of a base model: matrices by HF's module names; norms and biases (`vectors`) by HF's tensor names."""

    matrices: Mapping[str, Weight]
    vectors: Mapping[str, Tensor]
    embedding: Weight
    head: Weight
    compute: torch.dtype = torch.float32
    """The dtype of matrix products and of what lies between them; the residual stream and norms are float32."""

    def linear(self, module: str) -> Linear:
        return Linear(self.matrices[module], self.vectors.get(f"{module}.bias"))
