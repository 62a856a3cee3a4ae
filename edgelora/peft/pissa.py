"""PiSSA (arXiv:2404.02948): a LoRA that starts at the r largest singular values and vectors of W."""

from __future__ import annotations

import torch
from torch import Tensor

from edgelora.nn.linear import Weight
from edgelora.peft.defaults import MOST, Defaults, share_of_a_lora
from edgelora.peft.start import StartedDelta, require_rank

DEFAULTS = Defaults(rate=share_of_a_lora(1 / 3, f"a third of a LoRA's, {MOST}"))
OVERSAMPLED, ITERATIONS = 8, 4  # test_methods.py: what is left of a matrix is within 0.1 % of the exact SVD's


def fresh(weight: Weight, rank: int, alpha: float, generator: torch.Generator) -> StartedDelta:
    """A₀ = √(S/s) Vᵀ (r, d_in) and B₀ = U √(S/s) (d_out, r) with s = α/r, so that s B₀A₀ is W's best of rank r."""
    require_rank(weight, rank, "PiSSA")
    scale = alpha / rank
    u, s, vt = leading(weight.dequantize(), rank, generator)
    root = (s / scale).sqrt()
    return StartedDelta(root[:, None] * vt, u * root, scale)


@torch.no_grad()
def leading(
    weight: Tensor, rank: int, generator: torch.Generator, iterations: int = ITERATIONS
) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` leading U (d_out, r), S (r,) and Vᵀ (r, d_in) of a matrix (d_out, d_in).

    By subspace iteration from a random start (Halko et al., arXiv:0909.4061, algorithms 4.4 and 5.1): products and QRs
    of matrices that are `rank` + OVERSAMPLED wide instead of an SVD of the whole.
    """
    d_out, d_in = weight.shape
    width = min(rank + OVERSAMPLED, d_out, d_in)
    omega = torch.randn(d_in, width, generator=generator).to(weight)
    q = torch.linalg.qr(weight @ omega).Q  # (d_out, width)
    for _ in range(iterations):
        q = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ q).Q).Q
    u, s, vt = torch.linalg.svd(q.T @ weight, full_matrices=False)
    return (q @ u)[:, :rank].contiguous(), s[:rank], vt[:rank].contiguous()
