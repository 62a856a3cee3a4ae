"""NEFTune (arXiv:2310.05914): noise on the embeddings of what is learned from, so that it is not learned by heart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def neftune(x: Tensor, segment_lengths: Sequence[int], alpha: float, generator: torch.Generator) -> Tensor:
    """Embeddings x (T, d) + uniform noise in ±α/√(L·d), L the length of the segment that each token is in.

    `segment_lengths` add up to T. The noise is drawn where `generator` lives, so that a seed means the same on every
    device. Without gradients there is none: nothing is learned where a preference loss only looks (KTO's mean).
    """
    if not torch.is_grad_enabled():
        return x
    lengths = torch.tensor(segment_lengths, dtype=torch.float32)
    bounds = (alpha / (lengths * x.shape[1]).sqrt()).repeat_interleave(torch.tensor(segment_lengths))  # (T,)
    noise = torch.empty(x.shape, device=generator.device).uniform_(-1, 1, generator=generator)
    return x + (noise * bounds.to(noise.device)[:, None]).to(x)
