"""LoftQ (arXiv:2310.08659), one step: a LoRA over quantized weights Q(W) that starts at what quantization took away.

y = x Q(W)ᵀ + s x (B A)ᵀ, where at first s B A is the best of rank r that can be made of W − Q(W). The base stays the
file that it is, in whatever blocks, and what was learned is a plain LoRA over it. The paper goes on by turns, and
quantizes W − s B A again: that makes another base.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgelora.nn.linear import Weight
from edgelora.peft.lora import LoraDelta, fresh_pair
from edgelora.peft.pissa import leading
from edgelora.peft.start import require_rank

NOTHING = 1e-6  # of the largest singular value: below it lies float32's rounding of the difference


@torch.no_grad()
def from_original(weight: Weight, original: Tensor, rank: int, alpha: float, generator: torch.Generator) -> LoraDelta:
    """A₀ = √(S/s) Vᵀ (r, d_in) and B₀ = U √(S/s) (d_out, r), s = α/r: the r largest of W − Q(W) = U S Vᵀ.

    original: W (d_out, d_in) float32, overwritten. Where nothing was taken away, as of a weight that the file keeps in
    full, A is drawn and B zero, as in a LoRA: of two zeros neither would ever learn.
    """
    require_rank(weight, rank, "LoftQ")
    scale = alpha / rank
    held = weight.dequantize()
    lost = original.to(held.device).sub_(held)
    u, s, vt = leading(lost, rank, generator)
    root = (s / scale).sqrt()
    a, b = (part.to(lost) for part in fresh_pair(weight.shape, rank, generator))
    there = s > NOTHING * s[0]
    a[there], b[:, there] = (root[:, None] * vt)[there], (u * root)[:, there]
    return LoraDelta(a, b, scale)
