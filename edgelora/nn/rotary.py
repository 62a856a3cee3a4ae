"""Rotary position embedding (RoFormer, arXiv:2104.09864): the angles of every scaling, and the rotation itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from edgelora.architectures.config import ModelConfig
from edgelora.architectures.rope import Rope
from edgelora.errors import DataError
from edgelora.nn import compiled, gpu
from edgelora.nn.scratch import room_like

Tables = dict[Rope, tuple[Tensor, Tensor]]
"""The cos and sin (T, 1, rope.dim / 2) of each rope that some layer has."""


class Rotary(torch.autograd.Function):
    """Rotate the halves of each head by its position, in HF's layout of pairs.

    x (T, H, d), cos and sin (T, 1, r / 2): the first r numbers of a head rotate, the others stay as they are. The
    backward is the rotation by the opposite angle.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate(grads[0], cos, sin, -1.0), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """x (T, H, d) with its first 2·cos.shape[-1] columns rotated by halves, as HF does, by the angles times `sign`."""
    if compiled.usable(x) and cos.dtype == torch.float32 and cos.shape[-1] % compiled.LANES == 0 and len(cos) == len(x):
        x, out = x.contiguous(), room_like(x)
        (n_tokens, heads, dim), half, narrow = x.shape, cos.shape[-1], compiled.NARROW[x.dtype]
        tables = cos.contiguous(), sin.contiguous()
        compiled.over_rows("rotary", n_tokens, heads * dim, x, *tables, out, heads, dim, half, narrow, sign)
        return out
    if gpu.usable(x, cos) and cos.dtype == torch.float32 and len(cos) == len(x):
        rotated_rows: Tensor = gpu.kernels().rotary(x, cos.contiguous(), sin.contiguous(), sign)
        return rotated_rows
    sin = sin * sign
    rotated, wide = 2 * cos.shape[-1], x.to(cos.dtype)  # a product rounded to bfloat16 before its sum would lose much
    first, second = wide[..., :rotated].chunk(2, dim=-1)
    out = torch.empty_like(wide, memory_format=torch.contiguous_format)
    one, two = out[..., :rotated].chunk(2, dim=-1)
    torch.mul(first, cos, out=one).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=two).addcmul_(first, sin)
    if rotated < x.shape[-1]:
        out[..., rotated:] = x[..., rotated:]
    return out.to(x.dtype)


def rotary_tables(
    positions: Tensor, rope: Rope, starts: Sequence[int] | None = None, prefix: int = 0
) -> tuple[Tensor, Tensor]:
    """cos and sin, each float32 (T, 1, rope.dim / 2), for `positions` (T,) of a packed row with these segments.

    Dynamic and LongRoPE scaling rotate a sequence by its length, so each segment by its own. Raises DataError if
    segments that share their beginning would rotate it differently.
    """
    inverse = inverse_frequencies(rope).to(positions.device)  # (r / 2,)
    longest = int(positions.max()) + 1 if rope.scaling in ("dynamic", "longrope") and len(positions) else 0
    if longest > rope.original_max_position_embeddings:
        if prefix:
            raise DataError(
                what=f"a row of {longest} tokens that shares its beginning with others",
                why=f"beyond {rope.original_max_position_embeddings} tokens this base rotates a sequence by its length",
                fix=f"pass --max-length {rope.original_max_position_embeddings}",
            )
        borders = list(itertools.pairwise(starts or [0, len(positions)]))
        lengths = [int(positions[a:b].max()) + 1 if b > a else 0 for a, b in borders]
        inverse = torch.cat(
            [inverse_frequencies(rope, n).expand(b - a, -1) for (a, b), n in zip(borders, lengths, strict=True)]
        )
        inverse = inverse.to(positions.device)  # (T, r / 2)
    angles = positions.to(torch.float32)[:, None] * inverse
    return (angles.cos() * rope.attention_factor)[:, None], (angles.sin() * rope.attention_factor)[:, None]


def tables_of(config: ModelConfig, positions: Tensor, starts: Sequence[int], prefix: int = 0) -> Tables:
    """`rotary_tables` of every rope of a model, for a packed row: made once, for all layers."""
    ropes = {rope for i in range(config.num_hidden_layers) if (rope := config.rope_of(i)) is not None}
    return {rope: rotary_tables(positions, rope, starts, prefix) for rope in ropes}


def inverse_frequencies(rope: Rope, length: int = 0) -> Tensor:
    """Radians per position, float32 (rope.dim / 2,), for a sequence of `length` tokens."""
    theta, original = rope.theta, rope.original_max_position_embeddings
    if rope.scaling == "dynamic":
        longest = max(length, original)
        theta *= (rope.factor * longest / original - (rope.factor - 1)) ** (rope.dim / (rope.dim - 2))
    frequencies = 1.0 / theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "yarn":
        return frequencies / rope.factor * (ramp := _yarn_ramp(rope)) + frequencies * (1 - ramp)
    if rope.divisors:
        stretched = rope.scaling == "longrope" and length > original
        return frequencies / torch.tensor(rope.long_divisors if stretched else rope.divisors)
    return frequencies


def _yarn_ramp(rope: Rope) -> Tensor:
    """0 where a frequency stays as it is, 1 where it is stretched (arXiv:2309.00071, equation 18)."""

    def dimension(rotations: float) -> float:
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return rope.dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    return ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
