"""Sums of matrix products, `out = before + a₁ b₁ + a₂ b₂ + …`, in one pass over what they give (kernels/products.c).

A LoRA beside its frozen weight, and the gradients of an input that several weights read, are such sums. They are summed
in float32 and rounded once. What torch has for them rounds after each term, is slow where a factor is as narrow as an
adapter, and keeps memory and code for each shape it has seen.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from edgelora import team
from edgelora.kernels import call, load
from edgelora.nn.compiled import NARROW
from edgelora.nn.scratch import room

if TYPE_CHECKING:
    from edgelora.nn.linear import Weight

WORTH_A_THREAD = 1 << 21  # multiplications
FEW = 8  # rows: with fewer than these torch is faster


class Sum(NamedTuple):
    """out (m, n) = before (m, n) + Σ a (m, k) b (k, n): each a and b contiguous, or the transpose of what is.

    Factors are float32 or bfloat16, all of them, but that a b may be bfloat16 beside an a that is not. `out` is one of
    both; `before` float32, it may be `out`.
    """

    out: Tensor
    terms: Sequence[tuple[Tensor, Tensor]]
    before: Tensor | None = None


@runtime_checkable
class Floats(Protocol):
    """A weight that is stored as floats."""

    values: Tensor


def factor(weight: Weight, dtype: torch.dtype, rows: tuple[int, int] | None = None) -> Tensor:
    """A weight, or the first to the last of its rows, to stand beside factors of `dtype` in a `Sum`: what is stored as
    bfloat16 as it is."""
    if isinstance(weight, Floats) and weight.values.dtype == torch.bfloat16:
        return weight.values if rows is None else weight.values[slice(*rows)]
    return weight.dequantize(dtype) if rows is None else weight.rows(*rows, dtype)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a (m, k) b (k, n), in the dtype of a, on any device."""
    if not pay(a, a.dtype):
        return torch.mm(a, b.to(a.dtype), out=out)
    out = room(len(a), b.shape[1], dtype=a.dtype) if out is None else out
    compute(Sum(out, [(a, b)]))
    return out


def pay(a: Tensor, dtype: torch.dtype) -> bool:
    """Whether sums of products with a (m, k), in `dtype`, are faster than torch's."""
    return len(a) >= FEW and fit(a, dtype) and _answers("products_pay", dtype)


def fit(a: Tensor, dtype: torch.dtype) -> bool:
    """Whether there are any with a (m, k): bfloat16 numbers pass by twos."""
    return a.device.type == "cpu" and exist(dtype) and (dtype == torch.float32 or a.shape[1] % 2 == 0)


def exist(dtype: torch.dtype) -> bool:
    """Whether this processor sums products of such factors."""
    return dtype in NARROW and _answers("products_of", dtype)


def _answers(question: str, dtype: torch.dtype) -> bool:
    found = load.library()
    return found is not None and bool(getattr(found, question)(NARROW[dtype]))


def compute(*sums: Sum) -> None:
    """All of them, side by side: none reads what another gives."""
    narrow = NARROW[sums[0].terms[0][0].dtype]
    products, terms, alive, work = [], [], [], 0
    for out, pairs, before in sums:
        m, n = out.shape
        assert out.stride(1) == 1
        before_at = (0, 0) if before is None else (before.data_ptr(), before.stride(0))
        products += [out.data_ptr(), before_at[0], out.stride(0), before_at[1], m, n, len(pairs), NARROW[out.dtype]]
        for pair in pairs:
            a, b = (x if 1 in x.stride() else x.contiguous() for x in pair)
            k = a.shape[1]
            assert (len(a), *b.shape) == (m, k, n)
            assert b.dtype in (a.dtype, torch.bfloat16)
            across, down = _layout(a), _layout(b)
            terms += [a.data_ptr(), b.data_ptr(), across[0], down[0], k, across[1], down[1], NARROW[b.dtype]]
            alive += [a, b]
            work += m * n * k
    threads = len(team.split(team.threads(), work, WORTH_A_THREAD))
    memory = (ctypes.c_int64 * len(products))(*products), (ctypes.c_int64 * len(terms))(*terms)
    job = call.packed("products", *map(ctypes.addressof, memory), len(sums), threads, narrow)
    call.run("products", job, threads, threads)


def _layout(x: Tensor) -> tuple[int, bool]:
    """How far apart rows are, and whether x is stored transposed."""
    row, column = x.stride()
    return (row, False) if column == 1 else (column, True)
