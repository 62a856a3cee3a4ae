"""LoRMA_π (arXiv:2506.07621): W′ = s I_π(B A) W. Row i of B A is turned by i places, and so it is of full rank.

I_π(M)[i, j] = M[i, (j − i) mod d] of M = B A (d, d), d = d_out, with A (r, d) and B (d, r) as in `lorma.py`. It begins
as the identity: the first column of B and A[0, 0] are 1/√s, the rest of A zero, the rest of B random. By activations
it is y = z + z (s I_π(B A) − I)ᵀ of z = x Wᵀ (T, d), T d² products, where the authors' code makes W′ first, of d² d_in.

I_π(B A) W is no product of small matrices and needs all rows of W at once: what is saved is ΔW (d_out, d_in) itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from edgelora.nn.linear import Weight, product
from edgelora.peft.defaults import Defaults, Sourced, by_size
from edgelora.peft.lorma import AUTHORS
from edgelora.peft.method import Shapes

DEFAULTS = Defaults(  # a step of every number of A moves all of W′: too far below 1B, with the authors' rate
    rate=by_size(
        Sourced(5e-5, "with which 12 steps over SmolLM2-135M learned the most of those tried, 1.5e-5 to 5e-4"),
        AUTHORS,
    )
)


class LormaPiDelta(nn.Module):
    """lora_A (r, d_out) and lora_B (d_out, r) float32 are trained.

    Keeps z (T, d_out) for the backward pass, and makes I_π(B A) there again.
    """

    factors = None

    def __init__(self, a: Tensor, b: Tensor, scale: float, weight: Weight) -> None:
        super().__init__()
        self.lora_A, self.lora_B, self.scale, self.weight = nn.Parameter(a), nn.Parameter(b), scale, weight
        # 1 but for rounding, as `beyond_identity` rounds: so that it begins as exactly nothing
        self.identity = float(a[0, 0] * b[0, 0] * scale)

    def forward(self, x: Tensor, weight: Weight) -> Tensor:
        """x (T, d_in) → (T, d_out)."""
        z, (a, b) = product(x, weight), (self.lora_A, self.lora_B)
        y: Tensor = Turned.apply(z, a, b, self.scale, self.identity)  # type: ignore[no-untyped-call]
        return y

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """ΔW, over these very weights."""
        turned = beyond_identity(self.lora_A, self.lora_B, self.scale, self.identity)
        return {"delta": turned @ self.weight.dequantize(turned.dtype)}


class Turned(torch.autograd.Function):
    """z + z Nᵀ of z (T, d), N = s I_π(B A) − I in the dtype of z. Saves z, A and B."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, a: Tensor, b: Tensor, scale: float, identity: float) -> Tensor:
        ctx.save_for_backward(z, a, b)
        ctx.scale, ctx.identity = scale, identity
        return torch.addmm(z, z, beyond_identity(a, b, scale, identity).to(z.dtype).T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        z, a, b = ctx.saved_tensors
        dz = torch.addmm(dy, dy, beyond_identity(a, b, ctx.scale, ctx.identity).to(dy.dtype))
        of_product = turned_back((dy.T @ z).to(a.dtype)).mul_(ctx.scale)
        return dz, b.T @ of_product, of_product @ a.T, None, None


@torch.no_grad()
def beyond_identity(a: Tensor, b: Tensor, scale: float, identity: float) -> Tensor:
    """s I_π(B A) − I (d, d): the identity is the first column of s B A before it is turned."""
    d = len(b)
    twice = b.new_empty(d, 2 * d)  # every row behind itself: turned by i it begins i places before its second half
    twice[:, :d] = b @ a
    twice[:, :d].mul_(scale)[:, 0].sub_(identity)
    twice[:, d:] = twice[:, :d]
    return twice.as_strided((d, d), (2 * d - 1, 1), d)


def turned_back(m: Tensor) -> Tensor:
    """The matrix (d, d) that I_π makes m of, in memory of its own."""
    d = len(m)
    return torch.cat([m, m], 1).as_strided((d, d), (2 * d + 1, 1)).clone()


def square(d_out: int, _: int, __: int) -> Shapes:
    """The matrix that W is multiplied by."""
    return ((d_out, d_out),)


def fresh(weight: Weight, rank: int, alpha: float, generator: torch.Generator) -> LormaPiDelta:
    """The identity, as the paper begins; s = α/r. B beyond its first column is uniform in ±1/√r, as the authors' code
    has it: it does nothing yet."""
    d_out, _ = weight.shape
    scale, bound = alpha / rank, 1 / math.sqrt(rank)
    b = torch.empty(d_out, rank).uniform_(-bound, bound, generator=generator)
    b[:, 0] = 1.0
    a = torch.zeros(rank, d_out)
    a[0, 0] = 1.0
    return LormaPiDelta(a / math.sqrt(scale), b / math.sqrt(scale), scale, weight)
