"""Blocks and NF4 become floats on an NVIDIA GPU: a Triton function for each type, and the kernel that runs them.

A group is 32 weights side by side, what every type has in common: its codes lie together and at most two scales count.
`group` (g, 1) int64 counts groups over the flattened weight, `column` (1, 32) is 0 … 31; each function gives float32
(g, 32), with each rounding where ggml-quants.c has it. Imported only where there is a GPU to run it, or by tests, which
have Triton's interpreter run it.
"""

# What stands in a kernel is Triton's language; mypy can check only what launches it.
# mypy: allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def"
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from edgelora.nn.triton_launch import launch

Type = GGMLQuantizationType

GROUP = 32
GROUPS_AT_ONCE = 128  # of a program: 4096 weights, 32 for each of its 128 threads
# A product and a sum contracted into one operation would round once where ggml rounds twice.
EXACT: dict[str, Any] = {"enable_fp_fusion": False}


@triton.jit
def _half(at):
    """float32 of the half precision number at a place in the blocks; all blocks have even sizes."""
    return tl.load(at.to(tl.pointer_type(tl.float16))).to(tl.float32)


@triton.jit
def _byte(at):
    return tl.load(at).to(tl.int32)


@triton.jit
def _signed(at):
    return tl.load(at.to(tl.pointer_type(tl.int8))).to(tl.float32)


@triton.jit
def _q4_0(parts, group, column):
    """18 bytes: d, then 16 bytes whose low halves come before their high ones."""
    block = parts[0] + group * 18
    q = (_byte(block + 2 + column % 16) >> (column // 16 * 4)) & 15
    return (q - 8).to(tl.float32) * _half(block)


@triton.jit
def _q8_0(parts, group, column):
    """34 bytes: d, then 32 signed bytes."""
    block = parts[0] + group * 34
    return _signed(block + 2 + column) * _half(block)


@triton.jit
def _q4_k(parts, group, column):
    """144 bytes for 8 groups: d, minimum, 12 bytes of 6-bit scales and minimums, 4 x 32 bytes for two groups each."""
    block, j = parts[0] + group // 8 * 144, group % 8
    packed = block + 4 + j % 4
    a, b, c = _byte(packed), _byte(packed + 4), _byte(packed + 8)
    scale = tl.where(j < 4, a & 63, c & 15 | a >> 6 << 4)
    minimum = tl.where(j < 4, b & 63, c >> 4 | b >> 6 << 4)
    q = (_byte(block + 16 + j // 2 * 32 + column) >> (j % 2 * 4)) & 15
    return q.to(tl.float32) * (_half(block) * scale.to(tl.float32)) - _half(block + 2) * minimum.to(tl.float32)


@triton.jit
def _q6_k(parts, group, column):
    """210 bytes for 8 groups: 128 bytes of low halves, 64 of upper 2 bits, 16 signed scales (of 16 weights each), d."""
    block, half, j = parts[0] + group // 8 * 210, group % 8 // 4, group % 4
    low = _byte(block + half * 64 + j % 2 * 32 + column) >> (j // 2 * 4) & 15
    high = _byte(block + 128 + half * 32 + column) >> (j * 2) & 3
    scales = block + 192 + group % 8 * 2
    scale = _half(block + 208) * tl.where(column < 16, _signed(scales), _signed(scales + 1))
    return ((low | high << 4) - 32).to(tl.float32) * scale


@triton.jit
def _nf4(parts, group, column):  # noqa: ARG001
    """Codes of 32 bytes for two groups, the even weight in the high half; a scale of 8 bits for those, scaled by 256.

    parts: codes, scale_codes, scale_of_scales, offset, the 16 levels, the 256 levels of scales.
    """
    block = group // 2
    scale = tl.load(parts[5] + _byte(parts[1] + block)) * tl.load(parts[2] + block // 256) + tl.load(parts[3])
    pair = _byte(parts[0] + group * 16 + tl.arange(0, 16)[None, :])
    code = tl.reshape(tl.join(pair >> 4, pair & 15), (group.shape[0], 32))
    return tl.load(parts[4] + code) * scale


DECODE: dict[Type, Callable[..., Any]] = {Type.Q4_0: _q4_0, Type.Q8_0: _q8_0, Type.Q4_K: _q4_k, Type.Q6_K: _q6_k}


class Stored(NamedTuple):
    """A weight (d_out, d_in) as kernels take it: contiguous tensors on one device, and the function that reads them."""

    shape: tuple[int, int]
    parts: tuple[Tensor, ...]
    decode: Callable[..., Any]
    kind: str


def of_blocks(blocks: Tensor, kind: Type, columns: int) -> Stored:
    """GGUF blocks, uint8 (n_rows, bytes per row). `kind` is one of DECODE."""
    return Stored((len(blocks), columns), (blocks.contiguous(),), DECODE[kind], kind.name)


def of_nf4(shape: tuple[int, int], *parts: Tensor) -> Stored:
    """NF4: codes, scale_codes, scale_of_scales, offset (see `base/nf4.py`), its 16 levels and the 256 of its scales."""
    return Stored(shape, parts, _nf4, "NF4")


@triton.jit
def _dequantize(parts, out, begin, n_groups, decode: tl.constexpr, GROUPS: tl.constexpr):
    """Groups [begin, begin + n_groups) → out, flat."""
    place = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    column = tl.arange(0, 32)[None, :]
    inside = place < n_groups
    # beyond the end the last group is read once more, and not written
    weights = decode(parts, begin + tl.where(inside, place, n_groups - 1), column)
    tl.store(out + place * 32 + column, weights.to(out.dtype.element_ty), mask=inside)


def dequantize(weight: Stored, dtype: torch.dtype = torch.float32) -> Tensor:
    """(d_out, d_in) in memory of its own: computed in float32 and rounded once to `dtype`."""
    return rows(weight, 0, weight.shape[0], dtype)


def rows(weight: Stored, first: int, last: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows [first, last) of the weight, (last - first, d_in), as `dequantize` gives them."""
    columns = weight.shape[1]
    begin, end = first * columns, last * columns
    first_group = begin // GROUP  # of NF4 alone, groups may begin inside a row
    n_groups = -(-end // GROUP) - first_group
    out = torch.empty(n_groups * GROUP, dtype=dtype, device=weight.parts[0].device)
    if end > begin:
        grid = (triton.cdiv(n_groups, GROUPS_AT_ONCE),)
        arguments, constants = (weight.parts, out, first_group, n_groups), (weight.decode, GROUPS_AT_ONCE)
        launch(_dequantize, grid, arguments, constants, contract=False)
    begin -= first_group * GROUP
    return out[begin : begin + (last - first) * columns].view(last - first, columns)
