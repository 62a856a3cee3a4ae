"""GaLore (arXiv:2403.03507): full fine-tuning whose gradients are projected to r of their directions before Adam.

What it trains and leaves is `full.py`'s: ΔW (d_out, d_in) of every linear layer, of full rank, the norms, embedding and
head. The projection is the optimizer's (`training/galore.py`), and linear layers' alone, as in the authors' code.
"""

from __future__ import annotations

import torch

from edgelora.nn.linear import Weight
from edgelora.peft import remade
from edgelora.peft.defaults import Defaults, Sourced
from edgelora.peft.full import FullDelta

# r and α of the authors' example, where T is 200 (github.com/jiaweizzhao/GaLore)
DEFAULTS = Defaults(
    rank=Sourced(
        128,
        "the authors' example: Adam's moments are those of as many directions of each gradient (arXiv:2403.03507, "
        "github.com/jiaweizzhao/GaLore)",
    ),
    alpha=lambda _: Sourced(0.25, "GaLore's α, which multiplies each step: the authors' (arXiv:2403.03507)"),
)


def fresh(weight: Weight, *_: object) -> FullDelta:
    """Zero: it does nothing yet. Raises ConfigError over a quantized weight."""
    remade.require_floats(weight, "galore")
    return FullDelta(torch.zeros(weight.shape))
