"""OLoRA (arXiv:2406.01775): a LoRA that starts at r orthonormal columns, of the QR decomposition of W."""

from __future__ import annotations

import torch

from edgelora.nn.linear import Weight
from edgelora.peft.defaults import MOST, Defaults, share_of_a_lora
from edgelora.peft.start import StartedDelta, require_rank

DEFAULTS = Defaults(rate=share_of_a_lora(0.1, f"a tenth of a LoRA's, {MOST}"))  # A begins as large as a row of W


@torch.no_grad()
def fresh(weight: Weight, rank: int, alpha: float, _: torch.Generator) -> StartedDelta:
    """With W = Q R: B₀ = the first r columns of Q (d_out, r), A₀ = the first r rows of R (r, d_in). Draws nothing.

    The first r columns of Q and rows of R need only the first r columns of W and one product: R₍r₎ = Q₍r₎ᵀ W.
    """
    require_rank(weight, rank, "OLoRA")
    w = weight.dequantize()
    q = torch.linalg.qr(w[:, :rank]).Q  # (d_out, r)
    return StartedDelta((q.T @ w).contiguous(), q.contiguous(), alpha / rank)
