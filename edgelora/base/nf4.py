"""NF4 weights: 4-bit NormalFloat codes with doubly quantized scales (QLoRA, arXiv:2305.14314, section 3).

Codes, scales and dequantized floats are those of bitsandbytes' CPU code (`quantize_4bit(quant_type="nf4",
compress_statistics=True)` on x86-64), bit for bit, so that a base quantized here is the base that QLoRA users know.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgelora.base.products import Products, has_triton
from edgelora.errors import BaseModelError
from edgelora.kernels import load
from edgelora.nn import compiled
from edgelora.nn.scratch import scratch
from edgelora.team import run, split

if TYPE_CHECKING:
    from edgelora.base.triton_blocks import Stored

BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share a scale of their own

# Quantiles of the normal distribution with an exact zero, scaled to [-1, 1] (QLoRA, appendix E).
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

TINY = 1e-38  # the smallest scale that is divided by; blocks of zeros have none
GRID = 65535  # bitsandbytes' CPU code rounds scales to this many steps before it looks up their 8-bit code
BLOCKS_AT_ONCE = 8192  # for each thread: 2 MiB of floats and half as much of indices, about what a cache holds
ELEMENTS_PER_THREAD = 1 << 18  # fewer are not worth another thread
QUANTIZED_AT_ONCE = 1 << 16


class NF4(Products):
    """A weight (d_out, d_in) as NF4: 4.127 bits each. Blocks run over the flattened rows, as in bitsandbytes.

    codes: uint8 (n_blocks, 32), the even weight in the high nibble; the last block is filled up with zeros.
    scale_codes: uint8 (m, 256), m = ceil(n_blocks / 256), filled up likewise; scale_of_scales: float32 (m,);
    offset: float32 (), the mean scale.
    """

    def __init__(
        self, shape: tuple[int, int], codes: Tensor, scale_codes: Tensor, scale_of_scales: Tensor, offset: Tensor
    ) -> None:
        self.shape = shape
        self.codes, self.scale_codes = codes, scale_codes
        self.scale_of_scales, self.offset = scale_of_scales, offset
        self.size_bytes = sum(part.nbytes for part in (codes, scale_codes, scale_of_scales, offset))
        self._for_triton: Stored | None = None

    def to(self, device: torch.device | str) -> NF4:
        parts = (self.codes, self.scale_codes, self.scale_of_scales, self.offset)
        return NF4(self.shape, *(part.to(device) for part in parts))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.rows(0, self.shape[0], dtype)

    def rows(self, first: int, last: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if (stored := self.for_triton()) is not None:
            from edgelora.base import triton_blocks

            return triton_blocks.rows(stored, first, last, dtype)
        columns = self.shape[1]
        begin, end = first * columns, last * columns
        first_block, last_block = begin // BLOCK, -(-end // BLOCK)
        flat = self._floats(first_block, last_block, dtype).view(-1)
        out = flat[begin - first_block * BLOCK : end - first_block * BLOCK].view(last - first, columns)
        return out if dtype == out.dtype else scratch(last - first, columns, dtype, out.device).copy_(out)

    def _floats(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Blocks [first, last), (last - first, 64), in float32 or `dtype`, whichever comes sooner."""
        if self.codes.device.type != "cpu":
            return self._blocks_on_device(first, last)
        if load.library() is None:
            return self._blocks(first, last)
        dtype = dtype if dtype in compiled.NARROW else torch.float32
        out, codes = scratch(last - first, BLOCK, dtype), self.codes[first:last]
        scales, levels = self._scales(first, last), _levels(codes.device)
        compiled.over_rows("nf4_blocks", *out.shape, codes, scales, levels, out, compiled.NARROW[dtype])
        return out

    def gather(self, ids: Tensor) -> Tensor:
        at = ids[:, None] * self.shape[1] + torch.arange(self.shape[1], device=ids.device)  # (n, d_in)
        pair = self.codes.view(-1)[at // 2]
        nibble = torch.where(at % 2 == 0, pair >> 4, pair & 15)
        return _levels(ids.device)[nibble.int()].mul_(self._scales(0, len(self.codes))[at // BLOCK])

    def for_triton(self) -> Stored | None:
        device = self.codes.device
        if not has_triton(device):
            return None
        if self._for_triton is None:  # asked for three times a step: kept
            from edgelora.base import triton_blocks

            parts = (self.codes, self.scale_codes, self.scale_of_scales, self.offset)
            self._for_triton = triton_blocks.of_nf4(self.shape, *parts, _levels(device), _dynamic_map(device))
        return self._for_triton

    def _blocks_on_device(self, first: int, last: int) -> Tensor:
        """What `_blocks` gives, in memory of its own and by operations that MPS has."""
        pairs = self.codes[first:last]
        codes = torch.stack([pairs >> 4, pairs & 15], -1).view(-1).int()
        weights = torch.index_select(_levels(pairs.device), 0, codes).view(-1, BLOCK)
        return weights.mul_(self._scales(first, last)[:, None])

    def _blocks(self, first: int, last: int) -> Tensor:
        """Blocks [first, last) as float32 (last - first, 64), in the scratch buffer. On the CPU.

        One lookup per byte: a table of 256 pairs of floats, each pair read and written as one 64-bit number.
        """
        n = last - first
        out = scratch(n, BLOCK)
        codes, scales = self.codes[first:last], self._scales(first, last)
        pairs, words = _pairs(), out.view(torch.int64)
        pieces = split(n, n * BLOCK, ELEMENTS_PER_THREAD)
        step = max(1, min(n, BLOCKS_AT_ONCE))
        indices = scratch(len(pieces) * step, BLOCK // 2, torch.int32)  # index_select takes no bytes
        own = {begin: indices[i * step : (i + 1) * step] for i, (begin, _) in enumerate(pieces)}

        def work(begin: int, end: int) -> None:
            for a in range(begin, end, step):
                part = slice(a, min(a + step, end))
                index = own[begin][: part.stop - a].copy_(codes[part])
                torch.index_select(pairs, 0, index.view(-1), out=words[part].view(-1))
                out[part].mul_(scales[part, None])

        run(pieces, work)
        return out

    def _scales(self, first: int, last: int) -> Tensor:
        """float32 (last - first,): the scales of blocks [first, last)."""
        begin = first // SCALE_BLOCK
        codes = self.scale_codes[begin : -(-last // SCALE_BLOCK)]
        scales = torch.index_select(_dynamic_map(codes.device), 0, codes.view(-1).int()).view(codes.shape)
        scales.mul_(self.scale_of_scales[begin : begin + len(codes), None]).add_(self.offset)
        return scales.view(-1)[first - begin * SCALE_BLOCK : last - begin * SCALE_BLOCK]


def quantize_nf4(weight: Tensor) -> NF4:
    """Map every weight to the nearest of 16 levels times the largest magnitude in its block of 64.

    weight: (d_out, d_in) of any size and float type, on any device; read a few blocks at a time, so no second copy
    of it in float32 is made. Raises BaseModelError if it holds NaN or infinity.
    """
    flat = weight.detach().reshape(-1)
    whole = len(flat) // BLOCK * BLOCK
    codes = torch.empty(-(-len(flat) // BLOCK), BLOCK // 2, dtype=torch.uint8, device=flat.device)
    peaks = torch.empty(len(codes), device=flat.device)
    for a in range(0, whole // BLOCK, QUANTIZED_AT_ONCE):
        part = flat[a * BLOCK : min((a + QUANTIZED_AT_ONCE) * BLOCK, whole)].view(-1, BLOCK).float()
        peak = torch.amax(part.abs(), 1, out=peaks[a : a + len(part)])
        codes[a : a + len(part)] = _nearest(part * peak.clamp(min=TINY).reciprocal_()[:, None])
    if whole < len(flat):
        rest = torch.nn.functional.pad(flat[whole:].float(), (0, whole + BLOCK - len(flat)))
        peaks[-1] = rest.abs().max().clamp(min=TINY)
        codes[-1:] = _nearest((rest / peaks[-1])[None])  # divided, where whole blocks are multiplied: as bitsandbytes
    if not peaks.isfinite().all():
        raise BaseModelError(
            what="the weights hold NaN or infinity",
            why="scales are stored relative to their mean, so that one such weight would spoil the whole matrix",
            fix="download the base model again, or use another one",
        )
    return NF4((weight.shape[0], weight.shape[1]), codes, *(part.to(codes.device) for part in _quantize_scales(peaks)))


def _nearest(normed: Tensor) -> Tensor:
    """Weights in [-1, 1], (n, 64), as packed codes uint8 (n, 32)."""
    levels = _levels(normed.device)
    codes = torch.bucketize(normed.clamp_(-1, 1), (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8)
    return codes[:, ::2] << 4 | codes[:, 1::2]


def _quantize_scales(peaks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 (n,) → their 8-bit codes uint8 (m, 256), the scale of each 256 float32 (m,), the mean ().

    Computed on the CPU, whatever the weight is on: the sum's order decides the last bit of the mean.
    """
    scales = peaks.cpu()
    offset = scales.mean()
    padded = torch.nn.functional.pad(scales - offset, (0, -len(scales) % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    outer = padded.abs().amax(1)
    normed = padded.mul_(outer.reciprocal()[:, None]).clamp_(-1, 1)
    # nearest on the grid first, then the nearest code of that point: not always the nearest code
    grid = normed.add_(1).mul_(0.5).mul_(GRID).add_(0.5).int()
    levels = _dynamic_map(scales.device)
    codes = torch.bucketize(-1 + (2 * grid).float() / GRID, (levels[:-1] + levels[1:]) * 0.5, out_int32=True)
    codes[outer == 0] = 0
    return codes.to(torch.uint8), outer, offset


@cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(LEVELS, device=device)


@cache
def _pairs() -> Tensor:
    """int64 (256,): for each byte the two float32 of its nibbles, the high one first in memory."""
    byte = torch.arange(256)
    levels = torch.tensor(LEVELS)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], 1).view(torch.int64).view(-1)


@cache
def _dynamic_map(device: torch.device) -> Tensor:
    """float32 (256,): the 8-bit levels of scales, 2^i of each sign around 10^(i-6) (arXiv:1511.04561), 0 and 1."""
    decades = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        decades.append(10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2))
    positive = torch.cat(decades)
    return torch.cat([-positive, positive, torch.tensor([0.0, 1.0])]).sort().values.to(device)
