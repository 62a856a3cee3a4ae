"""Sums of matrix products (kernels/products.c): exact to float32 of any layout and size, by any number of threads."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from edgelora import team
from edgelora.base.weights import Dense
from edgelora.kernels import load
from edgelora.nn import cpu_lora, products
from edgelora.nn.linear import FrozenLinear, LoraLinears
from edgelora.nn.products import Sum, compute

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if products.exist(dtype)]
pytestmark = pytest.mark.skipif(not DTYPES, reason="this CPU has no AVX-512, or there was no compiler at installation")

# (m, k, n): one number, ends in every direction, more rows than have their sums at once, more depth than a panel has
SIZES = [(1, 2, 1), (7, 34, 5), (24, 576, 64), (13, 640, 65), (500, 48, 200), (30, 2100, 16), (64, 130, 48)]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def laid(x: Tensor, transposed: bool) -> Tensor:
    """The same numbers, stored column by column if `transposed`."""
    return x.T.contiguous().T if transposed else x.contiguous()


def exact(terms: Sequence[tuple[Tensor, Tensor]], before: Tensor | None = None) -> Tensor:
    found = sum(a.double() @ b.double() for a, b in terms)
    return found if before is None else found + before.double()


def assert_near(found: Tensor, wanted: Tensor, k: int) -> None:
    """To the last bits of float32 sums; of bfloat16 to one rounding of what is exact."""
    rounding = 2**-8 if found.dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(found.double(), wanted, atol=1e-6 * k, rtol=rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "n"), SIZES)
@pytest.mark.parametrize(("of_a", "of_b"), [(False, False), (False, True), (True, False), (True, True)])
def test_any_layout_and_size(dtype, m, k, n, of_a, of_b):
    terms = [
        (laid(draw(m, k, dtype=dtype), of_a), laid(draw(k, n, dtype=dtype, seed=1), of_b)),
        (draw(m, 6, dtype=dtype, seed=2), draw(6, n, dtype=dtype, seed=3)),
    ]
    other = (draw(m, 16, dtype=dtype, seed=4), draw(16, 16, dtype=dtype, seed=5))
    for kind, before in itertools.product((torch.float32, torch.bfloat16), (None, draw(m, n, seed=6))):
        room, beside = torch.full((m, n + 3), 7.0, dtype=kind), torch.empty(m, 16)
        compute(Sum(room[:, :n], terms, before), Sum(beside, [other]))
        assert_near(room[:, :n], exact(terms, before), k)
        assert (room[:, n:] == 7).all()  # nothing behind the end
        assert_near(beside, exact([other]), 16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_odd_number_of_rows_is_summed_over(dtype):
    """A gradient of B: over tokens, of which there may be an odd number."""
    part, dy = draw(33, 16, dtype=dtype), draw(33, 80, dtype=dtype, seed=1)
    out = torch.empty(16, 80)
    compute(Sum(out, [(part.T, dy)]))
    assert_near(out, exact([(part.T, dy)]), 33)


def test_a_bfloat16_weight_beside_float32_numbers():
    x, w = draw(40, 96), draw(70, 96, dtype=torch.bfloat16, seed=1)
    y, dx = torch.empty(40, 70), torch.empty(40, 96)
    compute(Sum(y, [(x, w.T)]))
    assert_near(y, exact([(x, w.T)]), 96)
    compute(Sum(dx, [(y, w)]))
    assert_near(dx, exact([(y, w)]), 70 * 10)


def test_what_is_added_to_may_be_what_was_there():
    out, a, b = draw(50, 70), draw(50, 40, seed=1), draw(40, 70, seed=2)
    wanted = exact([(a, b)], out)
    compute(Sum(out, [(a, b)], before=out))
    assert_near(out, wanted, 40)


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_stays_where_it_is(dtype):
    a, b = draw(30, 64, dtype=dtype), draw(64, 40, dtype=dtype, seed=1)
    a[3, 5] = float("nan")
    out = torch.empty(30, 40)
    compute(Sum(out, [(a, b)]))
    assert out[3].isnan().all()
    assert not out[[i for i in range(30) if i != 3]].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(monkeypatch, dtype):
    a, b = draw(100, 96, dtype=dtype), draw(96, 150, dtype=dtype, seed=1)
    found = []
    for n in (1, 2, 3, 7):
        monkeypatch.setattr(team, "threads", lambda n=n: n)
        monkeypatch.setattr(products, "WORTH_A_THREAD", 1)
        out, second = torch.zeros(100, 150), torch.zeros(96, 96)
        compute(Sum(out, [(a, b)]), Sum(second, [(a.T, a)]))
        found.append((out, second))
    assert all(torch.equal(x, y) for pair in found for x, y in zip(found[0], pair, strict=True))


def test_rows_do_not_depend_on_how_many_there_are():
    """So that a packed row gives the losses of its parts."""
    a, b = draw(100, 96), draw(96, 150, seed=1)
    whole, part = torch.empty(100, 150), torch.empty(37, 150)
    compute(Sum(whole, [(a, b)]))
    compute(Sum(part, [(a[20:57], b)]))
    assert torch.equal(whole[20:57], part)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_several_loras_are_what_torch_computes(monkeypatch, dtype, stored, scale):
    """Over weights that stay as they are stored, and over ones that take turns in one buffer."""
    x = draw(50, 96, dtype=dtype)
    weights = [Dense(draw(rows, 96, dtype=stored, seed=rows)) for rows in (80, 32, 48)]
    pairs = [draw(*size, seed=i) for i, size in enumerate([(4, 96), (80, 4), (6, 96), (32, 6), (4, 96), (48, 4)])]
    grads = [draw(50, len(b), dtype=dtype, seed=20 + i) for i, b in enumerate(pairs[1::2])]

    def gradients() -> list[Tensor]:
        inputs = [t.clone().requires_grad_() for t in (x, *pairs)]
        ys = LoraLinears.apply(inputs[0], weights, [scale] * 3, *inputs[1:])
        return [*(y.detach().float() for y in ys), *(g.float() for g in torch.autograd.grad(ys, inputs, grads))]

    ours, calls, function = gradients(), [], cpu_lora.backward
    monkeypatch.setattr(cpu_lora, "backward", lambda *given: calls.append(1) or function(*given))
    gradients()
    assert bool(calls) == products.pay(x, dtype)
    monkeypatch.setattr(load, "library", lambda: None)
    through_torch = gradients()
    for found, wanted in zip(ours, through_torch, strict=True):
        off = float((found - wanted).norm() / wanted.norm())
        assert off < (1e-5 if dtype == torch.float32 else 1.2e-2)


@pytest.mark.parametrize("rows", [1, products.FEW - 1, products.FEW, 40])
def test_a_frozen_layer_of_few_and_of_many_rows(rows):
    x, w = draw(rows, 64).requires_grad_(), draw(48, 64, seed=1)
    y = FrozenLinear.apply(x, Dense(w))
    torch.testing.assert_close(y, x @ w.T)
    dy = draw(rows, 48, seed=2)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], dy @ w)


def test_odd_ranks_of_bfloat16_pass_through_torch():
    x = draw(50, 96, dtype=torch.bfloat16)
    odd = draw(3, 96, seed=1), draw(32, 3, seed=2), draw(4, 96), draw(31, 4)
    assert not cpu_lora.usable(x, odd[:2])
    assert not cpu_lora.usable(x, odd[2:])
    y = LoraLinears.apply(x, [Dense(draw(32, 96))], [2.0], draw(3, 96, seed=1), draw(32, 3, seed=2))[0]
    assert y.isfinite().all()


def test_bfloat16_rows_of_an_odd_length_are_copied():
    wide, w = draw(16, 33, dtype=torch.bfloat16), draw(48, 33, dtype=torch.bfloat16, seed=1)
    x, part = wide[:, :32], w[:, :32]
    out = torch.empty(16, 48)
    compute(Sum(out, [(x, part.T)]))
    assert_near(out, exact([(x, part.T)]), 32)


@pytest.mark.parametrize(("m", "k", "n"), [(16, 0, 8), (0, 16, 8), (16, 8, 0)])
def test_products_of_nothing_are_torchs(m, k, n):
    assert torch.equal(products.product(draw(m, k), draw(k, n)), torch.zeros(m, n))
    with pytest.raises(ValueError, match="a product of nothing"):
        compute(Sum(torch.empty(m, n), [(draw(m, k), draw(k, n))]))


@pytest.mark.parametrize("rows", [2, 30])
def test_a_pair_whose_b_is_stored_transposed(rows):
    """RepLoRA's are made so."""
    a, b, x = draw(4, 96), draw(4, 32, seed=1).T, draw(rows, 96, seed=2)
    inputs = [t.clone().requires_grad_() for t in (x, a)] + [b.detach().requires_grad_()]
    (y,) = LoraLinears.apply(inputs[0], [Dense(draw(32, 96, seed=3))], [2.0], *inputs[1:])
    dy = draw(rows, 32, seed=4)
    d_b = torch.autograd.grad(y, inputs, dy)[2]
    torch.testing.assert_close(d_b, 2 * dy.T @ (x @ a.T), atol=1e-4, rtol=1e-5)


def test_a_stack_of_256_kb_is_enough():
    size, found = threading.stack_size(256 * 1024), []
    try:
        worker = threading.Thread(target=lambda: found.append(products.product(draw(16, 32), draw(32, 8))))
        worker.start()
        worker.join()
    finally:
        threading.stack_size(size)
    assert found[0].shape == (16, 8)


def test_a_long_sum_is_as_exact_as_torchs():
    """Gradients of float32 models were off by 2e-4 where sums of thousands of numbers ran through in one go."""
    a, b = draw(50, 8192), draw(8192, 48, seed=1)
    out, wanted = torch.empty(50, 48), exact([(a, b)])
    compute(Sum(out, [(a, b)]))
    ours, theirs = (float((found - wanted).norm() / wanted.norm()) for found in (out, a @ b))
    assert ours < 2 * theirs
    assert ours < 5e-7
