"""GGUF blocks on devices that ggml's kernels cannot reach: by Triton on NVIDIA GPUs, else by torch operations alone.

The torch code runs on every device: of all its operations torch has a version for MPS, and none makes float64.

Each function takes blocks uint8 (n, bytes per block) and gives float32 (n, weights per block), with each rounding
where ggml-quants.c has it, so results are ggml's bit for bit. A ggml whose compiler contracted a product and a sum into
one operation (usual on ARM, never seen on x86-64) differs in the last bit where a type has a minimum: Q4_1, Q5_1, Q2_K,
Q4_K, Q5_K.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from edgelora.base.products import Products, has_triton
from edgelora.errors import BaseModelError

if TYPE_CHECKING:
    from edgelora.base.triton_blocks import Stored

Type = GGMLQuantizationType

# The 16 levels of IQ4_NL and IQ4_XS (kvalues_iq4nl, ggml-common.h).
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _split(blocks: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    return torch.split(blocks, list(sizes), dim=1)


def _half(field: Tensor) -> Tensor:
    """Two bytes (n, 2) → float32 (n, 1)."""
    return field.contiguous().view(torch.float16).float()


def _bits(field: Tensor, width: int) -> Tensor:
    """Cut each byte into its 8 / width numbers: (..., k) → (..., 8 / width, k), the lowest bits first."""
    field, mask = field.contiguous(), (1 << width) - 1
    return torch.stack([field >> shift & mask for shift in range(0, 8, width)], -2)


def _q4_0(blocks: Tensor) -> Tensor:
    d, qs = _split(blocks, 2, 16)
    return _bits(qs, 4).flatten(1).float().sub_(8).mul_(_half(d))


def _q4_1(blocks: Tensor) -> Tensor:
    d, m, qs = _split(blocks, 2, 2, 16)
    return _bits(qs, 4).flatten(1).float().mul_(_half(d)).add_(_half(m))


def _five_bits(high: Tensor, low: Tensor) -> Tensor:
    """The fifth bits (n, 4), one after the other, and 4-bit halves (n, 16) → float32 (n, 32)."""
    fifth = _bits(high, 1).transpose(1, 2).flatten(1)  # (n, 4 bytes, 8 bits) → (n, 32)
    return (_bits(low, 4).flatten(1) | fifth << 4).float()


def _q5_0(blocks: Tensor) -> Tensor:
    d, high, low = _split(blocks, 2, 4, 16)
    return _five_bits(high, low).sub_(16).mul_(_half(d))


def _q5_1(blocks: Tensor) -> Tensor:
    d, m, high, low = _split(blocks, 2, 2, 4, 16)
    return _five_bits(high, low).mul_(_half(d)).add_(_half(m))


def _q8_0(blocks: Tensor) -> Tensor:
    d, qs = _split(blocks, 2, 32)
    return qs.view(torch.int8).float().mul_(_half(d))


def _q2_k(blocks: Tensor) -> Tensor:
    scales, qs, d, minimum = _split(blocks, 16, 64, 2, 2)
    q = _bits(qs.reshape(-1, 2, 32), 2).reshape(-1, 16, 16)  # (n, 2 halves, 4 shifts, 2 x 16)
    d, minimum = _half(d) * (scales & 15), _half(minimum) * (scales >> 4)  # (n, 16)
    return q.float().mul_(d[..., None]).sub_(minimum[..., None]).flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    high, low, scales, d = _split(blocks, 32, 64, 12, 2)
    q = _bits(low.reshape(-1, 2, 32), 2).flatten(1, 2) | _bits(high, 1) << 2  # (n, 8, 32)
    four, two = _bits(scales[:, :8], 4), _bits(scales[:, 8:], 2)  # (n, 2, 8) and (n, 4, 4)
    scale = _half(d) * (four.flatten(1) | two.flatten(1) << 4).float().sub_(32)  # (n, 16)
    return q.reshape(-1, 16, 16).float().sub_(4).mul_(scale[..., None]).flatten(1)


def _scales_and_minimums(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 6-bit scales and minimums of Q4_K and Q5_K: 12 bytes (n, 12) → twice (n, 8)."""
    one, two, three = _split(packed, 4, 4, 4)
    scales = torch.cat([one & 63, three & 15 | one >> 6 << 4], 1)
    return scales, torch.cat([two & 63, three >> 4 | two >> 6 << 4], 1)


def _q4_k(blocks: Tensor) -> Tensor:
    d, minimum, packed, qs = _split(blocks, 2, 2, 12, 128)
    return _scaled(_bits(qs.reshape(-1, 4, 32), 4).flatten(1, 2), d, minimum, packed)


def _q5_k(blocks: Tensor) -> Tensor:
    d, minimum, packed, high, low = _split(blocks, 2, 2, 12, 32, 128)
    q = _bits(low.reshape(-1, 4, 32), 4).flatten(1, 2) | _bits(high, 1) << 4
    return _scaled(q, d, minimum, packed)


def _scaled(q: Tensor, d: Tensor, minimum: Tensor, packed: Tensor) -> Tensor:
    """q (n, 8, 32) → d · scale · q − minimum of each group of 32."""
    scales, minimums = _scales_and_minimums(packed)
    scales, minimums = _half(d) * scales, _half(minimum) * minimums  # (n, 8)
    return q.float().mul_(scales[..., None]).sub_(minimums[..., None]).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    low, high, scales, d = _split(blocks, 128, 64, 16, 2)
    q = _bits(low.reshape(-1, 2, 64), 4).reshape(-1, 2, 4, 32)
    q = q | _bits(high.reshape(-1, 2, 32), 2) << 4
    scale = _half(d) * scales.view(torch.int8)  # (n, 16)
    return q.reshape(-1, 16, 16).float().sub_(32).mul_(scale[..., None]).flatten(1)


def _iq4_nl(blocks: Tensor) -> Tensor:
    d, qs = _split(blocks, 2, 16)
    return _iq4(_bits(qs, 4).flatten(1)).mul_(_half(d))


def _iq4_xs(blocks: Tensor) -> Tensor:
    d, two, four, qs = _split(blocks, 2, 2, 4, 128)
    low = _bits(four, 4).transpose(1, 2).flatten(1)  # (n, 4 bytes, 2) → (n, 8)
    high = _bits(two, 2).transpose(1, 2).flatten(1)  # (n, 2 bytes, 4) → (n, 8)
    scale = _half(d) * (low | high << 4).float().sub_(32)
    q = _bits(qs.reshape(-1, 8, 16), 4).flatten(2)  # (n, 8, 32)
    return _iq4(q).mul_(scale[..., None]).flatten(1)


def _iq4(q: Tensor) -> Tensor:
    """Codes of 4 bits as their levels, float32 of the same shape."""
    return torch.index_select(_iq4_levels(q.device), 0, q.view(-1).int()).view(q.shape)


@cache
def _iq4_levels(device: torch.device) -> Tensor:
    return torch.tensor(IQ4_LEVELS, dtype=torch.float32, device=device)


DEQUANTIZE: dict[Type, Callable[[Tensor], Tensor]] = {
    Type.Q4_0: _q4_0, Type.Q4_1: _q4_1, Type.Q5_0: _q5_0, Type.Q5_1: _q5_1, Type.Q8_0: _q8_0,
    Type.Q2_K: _q2_k, Type.Q3_K: _q3_k, Type.Q4_K: _q4_k, Type.Q5_K: _q5_k, Type.Q6_K: _q6_k,
    Type.IQ4_NL: _iq4_nl, Type.IQ4_XS: _iq4_xs,
}  # fmt: skip


def dequantize_blocks(blocks: Tensor, kind: Type, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of blocks, uint8 (n_rows, bytes per row) on any device, as `dtype` (n_rows, columns) there.

    Computed in float32 and rounded once. Needs about three times the result in memory while it runs.
    Raises BaseModelError for a type outside DEQUANTIZE.
    """
    function = _function(kind)
    weights, block_bytes = GGML_QUANT_SIZES[kind]
    if blocks.ndim != 2 or blocks.shape[1] * weights != columns * block_bytes:
        raise ValueError(f"blocks of shape {tuple(blocks.shape)} are not rows of {columns} {kind.name} weights")
    return function(blocks.reshape(-1, block_bytes)).view(len(blocks), columns).to(dtype)


def _function(kind: Type) -> Callable[[Tensor], Tensor]:
    if kind not in DEQUANTIZE:
        raise BaseModelError(
            what=f"weights of type {kind.name} cannot be used on a GPU",
            why=f"edgelora has device code for {', '.join(row.name for row in DEQUANTIZE)}",
            fix="train on the CPU, or over a base of one of these types",
        )
    return DEQUANTIZE[kind]


# The types with a kernel in base/triton_blocks.py, which is imported where it runs only.
TRITON = frozenset({Type.Q4_0, Type.Q8_0, Type.Q4_K, Type.Q6_K})


class DeviceBlocks(Products):
    """A weight kept in GGUF blocks on a device: `blocks` uint8 (d_out, bytes per row) of type `kind`."""

    def __init__(self, blocks: Tensor, kind: Type, columns: int) -> None:
        _function(kind)  # refuse a type without one while the model is opened
        self.blocks, self.kind = blocks, kind
        self.shape = (len(blocks), columns)
        self.size_bytes = blocks.nbytes
        self._for_triton: Stored | None = None

    def to(self, device: torch.device | str) -> DeviceBlocks:
        return DeviceBlocks(self.blocks.to(device), self.kind, self.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        if (stored := self.for_triton()) is None:
            return dequantize_blocks(self.blocks, self.kind, self.shape[1], dtype)
        from edgelora.base import triton_blocks

        return triton_blocks.dequantize(stored, dtype)

    def rows(self, first: int, last: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._floats(self.blocks[first:last], dtype)

    def gather(self, ids: Tensor) -> Tensor:
        return self._floats(self.blocks[ids])

    def for_triton(self) -> Stored | None:
        if self._for_triton is None:  # asked for three times a step: kept
            self._for_triton = self._stored(self.blocks)
        return self._for_triton

    def _floats(self, blocks: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        if (stored := self._stored(blocks)) is not None:
            from edgelora.base import triton_blocks

            return triton_blocks.dequantize(stored, dtype)
        return dequantize_blocks(blocks, self.kind, self.shape[1], dtype)

    def _stored(self, blocks: Tensor) -> Stored | None:
        if self.kind not in TRITON or not has_triton(blocks.device):
            return None
        from edgelora.base import triton_blocks

        return triton_blocks.of_blocks(blocks, self.kind, self.shape[1])
