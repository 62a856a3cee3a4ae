"""What adapters add to a layer's answer that hangs on its input otherwise than a matrix does, in numpy.

No weight can hold it, nor anything that llama.cpp loads: it is computed in torch alone (`attached.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from edgelora.peft.change import LoraPair


@dataclass(frozen=True)
class Bottleneck:
    """y + U act(D y + d) + u, y = W x: D (r, d_out), d (r,), U (d_out, r), u (d_out,), all float32."""

    down: np.ndarray
    down_bias: np.ndarray
    up: np.ndarray
    up_bias: np.ndarray


@dataclass(frozen=True)
class Mixture:
    """W x + Σₑ gₑ(x) Bₑ Aₑ x, g = softmax(R x): the pairs of E experts beside each other, and R (E, d_in) float32."""

    pair: LoraPair
    router: np.ndarray


OfInput: TypeAlias = Bottleneck | Mixture
