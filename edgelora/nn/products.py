"""Sums of matrix products, `out = before + a₁ b₁ + a₂ b₂ + …`, in one pass over what they give (kernels/products.c).

A LoRA beside its frozen weight, and the gradients of an input that several weights read, are such sums. They are summed
in float32 and rounded once. What torch has for them rounds after each term, is slow where a factor is as narrow as an
adapter, and keeps memory and code for each shape it has seen.
"""

from __future__ import annotations

import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from edgelora import team
from edgelora.kernels import call, load
from edgelora.nn.compiled import NARROW
from edgelora.nn.scratch import room, scratch

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


def factor(weight: Weight, dtype: torch.dtype, rows: tuple[int, int] | None = None) -> Tensor:
    """A weight, or the first to the last of its rows, to stand beside factors of `dtype` in a `Sum`: what is stored as
    bfloat16 as it is."""
    values: Tensor | None = getattr(weight, "values", None)  # of a `Dense` one; asked for some hundred times a step
    if values is not None and values.dtype == torch.bfloat16 and exist(dtype) and values.device.type == "cpu":
        return values if rows is None else values[slice(*rows)]
    return weight.dequantize(dtype) if rows is None else weight.rows(*rows, dtype)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a (m, k) b (k, n), in the dtype of a, on any device."""
    if not pay(a, a.dtype) or not b.shape[1]:
        b = b if b.dtype == a.dtype else _widened(b, a.dtype)
        if out is not None and a.device.type == "mps":
            return out.copy_(a @ b)  # it has written garbage into a part of a larger `out` (pytorch#193385)
        return torch.mm(a, b, out=out)
    out = room(a.shape[0], b.shape[1], dtype=a.dtype) if out is None else out
    compute(Sum(out, [(a, b)]))
    return out


def add_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out (m, n) += a (m, k) b (k, n), on any device; out may be float32 where a is not."""
    ours = pay(a, a.dtype) and b.shape[1] > 0
    if ours and out.dtype == torch.float32:
        compute(Sum(out, [(a, b)], before=out))
        return out
    alike = out.dtype == a.dtype == b.dtype
    return out.addmm_(a, b) if alike and not ours else out.add_(product(a, b))


def _widened(b: Tensor, dtype: torch.dtype) -> Tensor:
    """b (k, n) in another dtype, laid out as it is, in the buffer of weights."""
    _, transposed, b = _laid(b)
    b = b.T if transposed else b
    b = scratch(b.shape[0], b.shape[1], dtype, b.device).copy_(b)
    return b.T if transposed else b


def pay(a: Tensor, dtype: torch.dtype) -> bool:
    """Whether sums of products with a (m, k), in `dtype`, are faster than torch's."""
    return a.shape[0] >= FEW and a.shape[1] > 0 and fit(a, dtype) and are_faster(dtype)


def fit(a: Tensor, dtype: torch.dtype) -> bool:
    """Whether there are any with a (m, k): bfloat16 numbers pass by twos."""
    return a.device.type == "cpu" and exist(dtype) and (dtype == torch.float32 or a.shape[1] % 2 == 0)


def are_faster(dtype: torch.dtype) -> bool:
    """Whether on this processor they are faster than torch's."""
    return dtype in NARROW and _answers("products_pay", dtype)


def exist(dtype: torch.dtype) -> bool:
    """Whether this processor sums products of such factors."""
    return dtype in NARROW and _answers("products_of", dtype)


def _answers(question: str, dtype: torch.dtype) -> bool:
    found = load.library()
    return found is not None and bool(getattr(found, question)(NARROW[dtype]))


def compute(*sums: Sum) -> None:
    """All of them, side by side: none reads what another gives."""
    listed: list[int] = []
    terms: list[int] = []
    alive: list[Tensor] = []
    work = 0
    for out, pairs, before in sums:
        m, n = out.shape
        row, column = out.stride()
        assert column == 1
        assert before is None or (before.dtype == torch.float32 and before.stride(1) == 1)
        if not all((m, n, *(a.shape[1] for a, _ in pairs))):
            raise ValueError(f"a product of nothing: {out.shape}, {[a.shape for a, _ in pairs]}")
        before_at, before_row = (0, 0) if before is None else (before.data_ptr(), before.stride(0))
        listed += out.data_ptr(), before_at, row, before_row, m, n, len(pairs), NARROW[out.dtype]
        for a, b in pairs:
            k = a.shape[1]
            assert (a.shape[0], *b.shape) == (m, k, n)
            a_row, a_transposed, a = _laid(a)
            b_row, b_transposed, b = _laid(b)
            if a.dtype == torch.bfloat16:  # numbers that pass by twos lie in whole words
                assert k % 2 == 0 or (a_transposed and not b_transposed)
                if a_row % 2 and not a_transposed:
                    a_row, a = k, a.contiguous()
                if b_row % 2 and b_transposed:
                    b_row, b_transposed, b = n, False, b.contiguous()
            terms += a.data_ptr(), b.data_ptr(), a_row, b_row, k, a_transposed, b_transposed, NARROW[b.dtype]
            alive += a, b
            work += m * n * k
    narrow = NARROW[alive[0].dtype]
    assert all(x.dtype == alive[0].dtype or (not narrow and x.dtype == torch.bfloat16) for x in alive)
    threads = len(team.split(team.threads(), work, WORTH_A_THREAD))
    memory = array.array("q", listed), array.array("q", terms)
    job = call.packed("products", *(x.buffer_info()[0] for x in memory), len(sums), threads, narrow)
    call.run("products", job, threads, threads)


def _laid(x: Tensor) -> tuple[int, bool, Tensor]:
    """How far apart rows are, whether it is stored transposed, and x, which is copied if neither fits."""
    row, column = x.stride()
    if column == 1:
        return row, False, x
    return (column, True, x) if row == 1 else (x.shape[1], False, x.contiguous())
