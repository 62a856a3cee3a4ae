"""NEFTune (arXiv:2310.05914): noise on the embeddings of what is learned from, so that it is not learned by heart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def neftune(
    x: Tensor, segment_lengths: Sequence[int], alpha: float, generator: torch.Generator, prefix: int = 0
) -> Tensor:
    """Embeddings x (T, d) + uniform noise in ±α/√(L·d), L the length of the sequence that each token is in.

    Of a packed row: `prefix` tokens that all sequences begin with, then what is each one's own, `segment_lengths`; they
    add up to T. L is that of both together, and for the shared tokens that of the shortest sequence, so that a sequence
    has the noise that it has alone, and its beginning no less than that. The noise is drawn where `generator` lives, so
    that a seed means the same on every device. Without gradients there is none: nothing is learned where a preference
    loss only looks (KTO's mean).
    """
    if not torch.is_grad_enabled():
        return x
    parts = [prefix, *segment_lengths]
    lengths = torch.tensor([prefix + min(segment_lengths), *(prefix + n for n in segment_lengths)], dtype=torch.float32)
    bounds = (alpha / (lengths * x.shape[1]).sqrt()).repeat_interleave(torch.tensor(parts))  # (T,)
    noise = torch.empty(x.shape, device=generator.device).uniform_(-1, 1, generator=generator)
    return x + (noise * bounds.to(noise.device)[:, None]).to(x)
