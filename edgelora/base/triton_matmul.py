"""Products with a weight that stays in its blocks: each tile is dequantized inside the kernel that multiplies by it.

No dense copy of the weight is written or read, which pays while few tokens share the work of dequantizing. With many,
every tile of tokens dequantizes the weight once more, and a dense copy and cuBLAS win. Where one way overtakes the
other is timed on the GPU itself, once for each shape, when a product of few tokens is first asked for. On an NVIDIA
H100 (torch 2.11, 4096 x 4096) a dense copy won throughout: 33 to 45 microseconds for 1 to 256 tokens, where fused
products took 68 to 87 over Q4_K and 227 to 378 over NF4. Training multiplies by dense copies there.
"""

# What stands in a kernel is Triton's language; mypy can check only what launches it.
# mypy: allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def"
from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from edgelora.base.triton_blocks import EXACT, GROUP, Stored, dequantize

GROUPS = 2  # of a tile: 64 columns of the weight
ROWS = 64  # of the weight, in a tile
FEWEST_TOKENS, MOST_TOKENS = 16, 128  # of a tile: tensor cores take no fewer, and registers hold no more

TRIED = (16, 32, 64, 128, 256)  # numbers of tokens at which both ways are timed; for more, a dense copy is sure to win
ROUNDS = 7

How = Literal["auto", "fused", "dense"]


@triton.jit
def _tile(parts, row, group, d_out, per_row, decode: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """float32 (ROWS, GROUPS x 32) from row `row` and group `group` of it on; past an edge, what lies at the edge."""
    place = tl.arange(0, ROWS * GROUPS)[:, None]
    row = tl.minimum(row + place // GROUPS, d_out - 1).to(tl.int64)
    group = tl.minimum(group + place % GROUPS, per_row - 1)
    weights = decode(parts, row * per_row + group, tl.arange(0, 32)[None, :])
    return tl.reshape(weights, (ROWS, GROUPS * 32))


@triton.jit
def _times_transposed(
    x, parts, y, n_tokens, d_out, d_in, decode: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """x (T, d_in), W (d_out, d_in) → y = x Wᵀ (T, d_out): a program has TOKENS x ROWS of it."""
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    first_row = tl.program_id(0) * ROWS
    total = tl.full((TOKENS, ROWS), 0.0, tl.float32)
    for group in range(0, d_in // 32, GROUPS):
        weights = _tile(parts, first_row, group, d_out, d_in // 32, decode, ROWS, GROUPS)
        column = group * 32 + tl.arange(0, GROUPS * 32)[None, :]
        inputs = tl.load(x + token * d_in + column, mask=(token < n_tokens) & (column < d_in), other=0.0)
        total = tl.dot(inputs, tl.trans(weights.to(x.dtype.element_ty)), total, input_precision="ieee")
    row = first_row + tl.arange(0, ROWS)[None, :]
    tl.store(y + token * d_out + row, total.to(y.dtype.element_ty), mask=(token < n_tokens) & (row < d_out))


@triton.jit
def _times(
    dy, parts, dx, n_tokens, d_out, d_in, decode: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """dy (T, d_out), W (d_out, d_in) → dx = dy W (T, d_in): a program has TOKENS x 32 GROUPS of it."""
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    group = tl.program_id(0) * GROUPS
    total = tl.full((TOKENS, GROUPS * 32), 0.0, tl.float32)
    for first_row in range(0, d_out, ROWS):
        weights = _tile(parts, first_row, group, d_out, d_in // 32, decode, ROWS, GROUPS)
        row = first_row + tl.arange(0, ROWS)[None, :]
        inputs = tl.load(dy + token * d_out + row, mask=(token < n_tokens) & (row < d_out), other=0.0)
        total = tl.dot(inputs, weights.to(dy.dtype.element_ty), total, input_precision="ieee")
    column = group * 32 + tl.arange(0, GROUPS * 32)[None, :]
    tl.store(dx + token * d_in + column, total.to(dx.dtype.element_ty), mask=(token < n_tokens) & (column < d_in))


class Crossover(NamedTuple):
    """The most tokens for which a fused product is taken, and why."""

    tokens: int
    why: str


# (kernel, type, shape, dtype, device) → what was timed there
measured: dict[tuple[str, str, tuple[int, int], torch.dtype, torch.device], Crossover] = {}


def times_transposed(x: Tensor, weight: Stored, how: How = "auto") -> Tensor:
    """x (T, d_in), W (d_out, d_in) → x Wᵀ (T, d_out) in x's dtype; W is rounded to it, sums are float32.

    how: `fused` never writes W, `dense` writes it whole and asks cuBLAS, `auto` takes the faster.
    """
    if _is_fused(_times_transposed, x, weight, how):
        return _launch(_times_transposed, x, weight)
    return F.linear(x, dequantize(weight, x.dtype))


def times(dy: Tensor, weight: Stored, how: How = "auto") -> Tensor:
    """dy (T, d_out), W (d_out, d_in) → dy W (T, d_in), as `times_transposed`."""
    if _is_fused(_times, dy, weight, how):
        return _launch(_times, dy, weight)
    return dy @ dequantize(weight, dy.dtype)


def crossover(fused: Callable[[int], float], dense: Callable[[int], float]) -> Crossover:
    """Where a dense copy begins to win, from the seconds that each way takes for a number of tokens."""
    most = 0
    for tokens in TRIED:
        ours, theirs = fused(tokens), dense(tokens)
        if ours > theirs:
            return Crossover(most, f"at {tokens} tokens {1e6 * ours:.0f} µs, {1e6 * theirs:.0f} µs over a dense copy")
        most = tokens
    return Crossover(most, f"at {most} tokens {1e6 * ours:.0f} µs, {1e6 * theirs:.0f} µs over a dense copy")


def _is_fused(kernel: Any, x: Tensor, weight: Stored, how: How) -> bool:
    if how == "dense" or weight.shape[1] % GROUP or not len(x):
        return False  # rows of NF4 need not be whole groups
    # float32 has no tensor cores that keep its precision: the kernel compiles to products that spill out of registers
    if how == "fused" or len(x) > TRIED[-1] or x.dtype == torch.float32:
        return how == "fused"
    key = (kernel.__name__, weight.kind, weight.shape, x.dtype, x.device)
    if key not in measured:
        measured[key] = _measure(kernel, x, weight)
    return len(x) <= measured[key].tokens


def _measure(kernel: Any, x: Tensor, weight: Stored) -> Crossover:
    product = times_transposed if kernel is _times_transposed else times

    def seconds(how: How, tokens: int) -> float:
        inputs = torch.ones(tokens, x.shape[1], dtype=x.dtype, device=x.device)
        taken: list[float] = []
        for _ in range(ROUNDS + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            product(inputs, weight, how)
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1e3)
        return median(taken[1:])  # the first compiles

    with torch.no_grad(), torch.cuda.device(x.device):
        return crossover(lambda n: seconds("fused", n), lambda n: seconds("dense", n))


def _launch(kernel: Any, x: Tensor, weight: Stored) -> Tensor:
    (n_tokens, _), (d_out, d_in) = x.shape, weight.shape
    tokens = min(max(triton.next_power_of_2(n_tokens), FEWEST_TOKENS), MOST_TOKENS)
    forward = kernel is _times_transposed
    tiles = triton.cdiv(d_out, ROWS) if forward else triton.cdiv(d_in, GROUPS * GROUP)
    out = torch.empty(n_tokens, d_out if forward else d_in, dtype=x.dtype, device=x.device)
    kernel[tiles, triton.cdiv(n_tokens, tokens)](
        x.contiguous(), weight.parts, out, n_tokens, d_out, d_in, weight.decode, tokens, ROWS, GROUPS,
        num_warps=8 if tokens == MOST_TOKENS else 4, **EXACT,
    )  # fmt: skip
    return out
