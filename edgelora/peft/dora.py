"""DoRA (arXiv:2402.09353): y = x (m ∘ (W + s B A) / ‖W + s B A‖)ᵀ. A LoRA turns the rows of W, m trains their lengths.

The lengths ‖W + s B A‖ are constants to the gradient (section 4.3 of the paper, and PEFT). Under dropout, as in PEFT,
the whole of it sees drop(x), and what is left out goes through W alone: x − drop(x) in the place of x above.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgelora.nn.dropped import Drop, parted
from edgelora.nn.linear import Factors, LoraLinears, Weight
from edgelora.nn.scaled import scaled
from edgelora.peft.adapter import SHORTEST
from edgelora.peft.defaults import RANK, SCALE_AT_RANK, SMALL, Defaults, Sourced, of_a_lora
from edgelora.peft.lora import fresh_pair


def rate(n_weights: float) -> Sourced:
    """A LoRA's, of which the authors took as much."""
    lora = of_a_lora(n_weights)
    took = "" if n_weights < SMALL else "; DoRA's own runs over 7B and 8B took 1e-4 to 2e-4"
    return Sourced(lora.value, lora.why + took)


DEFAULTS = Defaults(
    rank=Sourced(
        RANK, "as good as 32 for LLaMA2-7B and LLaMA3-8B (tables of DoRA's repository, github.com/NVlabs/DoRA)"
    ),
    alpha=lambda rank: Sourced(
        SCALE_AT_RANK * rank, "twice the rank, as in DoRA's own runs (arXiv:2402.09353, github.com/NVlabs/DoRA)"
    ),
    rate=rate,
)


class DoraDelta(nn.Module):
    """lora_A (r, d_in), lora_B (d_out, r) and lora_magnitude_vector (d_out,), float32; W's own lengths if it is None.

    Keeps one activation (T, d_out) more for the backward pass than a LoRA, and reads W twice.
    """

    factors = None
    squares: Tensor

    def __init__(self, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None, weight: Weight) -> None:
        super().__init__()
        self.lora_A, self.lora_B, self.scale = nn.Parameter(a), nn.Parameter(b), scale
        squares = torch.linalg.vector_norm(weight.dequantize(), dim=1).square()  # (d_out,)
        self.lora_magnitude_vector = nn.Parameter(squares.sqrt() if magnitude is None else magnitude)
        self.register_buffer("squares", squares, persistent=False)

    def forward(self, x: Tensor, weight: Weight) -> Tensor:
        (along,) = LoraLinears.apply(x, [weight], [self.scale], self.lora_A, self.lora_B)  # (T, d_out)
        return self._at_length(along, weight)

    def dropped(self, x: Tensor, weight: Weight, drop: Drop) -> Tensor:
        along, left_out = parted(x, weight, Factors(self.lora_A, self.lora_B, self.scale), drop)
        return self._at_length(along, weight) + left_out

    def _at_length(self, along: Tensor, weight: Weight) -> Tensor:
        lengths = row_lengths(weight, self.squares, self.lora_A, self.lora_B, self.scale)
        # in float32 beside bfloat16 products too: a factor rounded to 8 bits would be as wrong for every token
        return scaled(along, self.lora_magnitude_vector / lengths)

    def tensors(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named_parameters()}


@torch.no_grad()
def row_lengths(weight: Weight, squares: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """‖w + s b A‖ of every row (d_out,), without the matrix W + s B A: from ‖w‖² (`squares`), W Aᵀ and A Aᵀ."""
    cross = weight.dequantize(a.dtype) @ a.T  # (d_out, r)
    gram = a @ a.T  # (r, r)
    added = (b * (2 * scale * cross + scale**2 * (b @ gram))).sum(1)
    return (squares + added).clamp_(min=0).sqrt_().clamp_(min=SHORTEST)


def fresh(weight: Weight, rank: int, alpha: float, generator: torch.Generator) -> DoraDelta:
    """Magnitudes are those of the frozen rows: it does nothing yet (arXiv:2402.09353, section 4)."""
    return DoraDelta(*fresh_pair(weight.shape, rank, generator), alpha / rank, None, weight)
