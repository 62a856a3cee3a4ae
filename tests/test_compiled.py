"""The compiled code between products: that of torch, in float32 and in bfloat16, at the ends of the range too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from edgelora import team
from edgelora.base.nf4 import quantize_nf4
from edgelora.base.weights import Dense
from edgelora.kernels import load
from edgelora.nn import compiled, loss, products
from edgelora.nn.activations import SwiGLU, swiglu
from edgelora.nn.layer import Residual
from edgelora.nn.loss import LinearCrossEntropy, Target
from edgelora.nn.norm import RMSNorm, rms_norm
from edgelora.nn.rotary import Rotary

pytestmark = pytest.mark.skipif(load.library() is None, reason="no compiler was here at installation")

DTYPES = [torch.float32, torch.bfloat16]


# a NaN as processors make it, one with something in its lowest bits, and memory that was filled with ones
NANS = [0x7FC00000, 0x7FC00001, 0x7F800001, -1]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "library", lambda: None)


def with_gradients(function, inputs, *rest):
    """Output and gradients of `function(*inputs, *rest)` for a seeded gradient of the output."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = function(*inputs, *rest)
    return out.detach(), *torch.autograd.grad(out, inputs, draw(*out.shape, dtype=out.dtype, seed=9))


def assert_near(found: Tensor, exact: Tensor) -> None:
    """Float32 to its last bits; bfloat16 to one rounding of what is exact."""
    rtol = 2e-5 if found.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(found.float(), exact, atol=1e-5, rtol=rtol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 37, 700])
def test_swiglu(dtype, rows):
    inputs = [draw(rows, 160, dtype=dtype, seed=s, scale=4) for s in (1, 2)]
    found = with_gradients(SwiGLU.apply, inputs)
    gate, up = (x.float().requires_grad_() for x in inputs)
    out = torch.nn.functional.silu(gate) * up
    exact = out.detach(), *torch.autograd.grad(out, (gate, up), draw(*out.shape, dtype=dtype, seed=9).float())
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == dtype
        assert_near(ours, theirs)


@pytest.mark.parametrize("value", [200.0, -200.0, 3e38, -3e38, 0.0, -0.0, float("inf"), float("nan")])
def test_swiglu_at_the_ends(value):
    gate, up = torch.full((1, 16), value), torch.full((1, 16), 0.5)
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(swiglu(gate, up), expected, equal_nan=True)


@pytest.mark.parametrize("shape", [(2, 3, 32), (0, 32)])
def test_swiglu_of_any_shape(shape):
    gate, up = draw(*shape), draw(*shape, seed=1)
    torch.testing.assert_close(swiglu(gate, up), torch.nn.functional.silu(gate) * up)


def test_swiglu_of_two_dtypes():
    gate, up = draw(4, 32), draw(4, 32, dtype=torch.bfloat16)
    torch.testing.assert_close(swiglu(gate, up), torch.nn.functional.silu(gate) * up)


def test_rotary_of_one_angle_for_all():
    x, angles = draw(5, 2, 64), draw(1, 1, 32)
    expanded = [table.expand(5, 1, 32) for table in (angles.cos(), angles.sin())]
    repeated = [table.repeat(5, 1, 1) for table in (angles.cos(), angles.sin())]
    torch.testing.assert_close(Rotary.apply(x, *expanded), Rotary.apply(x, *repeated))
    torch.testing.assert_close(Rotary.apply(x, angles.cos(), angles.sin()), Rotary.apply(x, *repeated))


def test_swiglu_of_halves_of_one_matrix():
    """As a fused gate_up_proj gives them: rows of each half lie apart."""
    gate, up = draw(5, 64).chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(gate, up), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 576), (700, 64), (11, 4, 128)])
def test_rms_norm(monkeypatch, x_dtype, dtype, shape):
    x, w = draw(*shape, dtype=x_dtype, seed=1), draw(shape[-1], seed=2) + 1
    d_out = draw(*shape, dtype=dtype, seed=3)

    def run(x, dtype):
        x = x.clone().requires_grad_()
        y = RMSNorm.apply(x, w, 1e-5, dtype)
        return y.detach(), torch.autograd.grad(y, x, d_out.to(dtype))[0]

    found = run(x, dtype)
    through_torch(monkeypatch)
    expected = run(x.float(), torch.float32)
    assert found[0].dtype == dtype
    assert found[1].dtype == x_dtype
    for ours, theirs in zip(found, expected, strict=True):
        assert_near(ours, theirs)


def test_a_norm_of_what_is_not_finite_shows():
    x = draw(2, 32)
    x[1, 5] = float("nan")
    y, _ = rms_norm(x, torch.ones(32), 1e-5)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "half"), [(64, 32), (96, 32), (128, 64)])
def test_rotary(monkeypatch, dtype, dim, half):
    x, angles = draw(50, 3, dim, dtype=dtype), draw(50, 1, half, seed=1)
    found = with_gradients(lambda x: Rotary.apply(x, angles.cos(), angles.sin()), [x])
    through_torch(monkeypatch)
    exact = with_gradients(lambda x: Rotary.apply(x, angles.cos(), angles.sin()), [x])
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6 if dtype == torch.float32 else 2**-8, rtol=2**-8)


class Head:
    """A frozen head of floats."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.shape = values, values.shape

    def rows(self, first: int, last: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.values[first:last].to(dtype)


@pytest.mark.parametrize("compute", [None, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [64, 4096])
def test_cross_entropy(monkeypatch, compute, vocabulary):
    head, labels = Head(draw(vocabulary, 48, seed=1)), torch.arange(33) * 7 % vocabulary
    hidden = draw(33, 48)
    monkeypatch.setattr(loss, "LOGITS", 10 * vocabulary)

    def run():
        return with_gradients(lambda h: LinearCrossEntropy.apply(h, head, labels, Target(compute=compute)), [hidden])

    found = run()
    theirs = hidden.clone().requires_grad_()
    nll = torch.nn.functional.cross_entropy(theirs @ head.values.T, labels, reduction="none")
    (exact,) = torch.autograd.grad(nll, theirs, draw(33, seed=9))

    def errors(given: tuple[Tensor, ...]) -> list[float]:
        return [float((x - y).norm() / y.norm()) for x, y in zip(given, (nll.detach(), exact), strict=True)]

    rounded = compute is not None and products.exist(compute)  # what logits are products of, too
    assert all(
        error < limit for error, limit in zip(errors(found), (5e-3, 2e-2) if rounded else (1e-5, 5e-3), strict=True)
    )
    through_torch(monkeypatch)
    assert all(error < limit for error, limit in zip(errors(run()), (1e-5, 5e-3 if compute else 1e-5), strict=True))


@pytest.mark.parametrize("label", [-1, 64])
def test_a_label_outside_the_vocabulary_is_refused(label):
    with pytest.raises(IndexError, match="not one of 64 tokens"):
        LinearCrossEntropy.apply(draw(2, 48), Head(draw(64, 48)), torch.tensor([0, label]), Target())


@pytest.mark.parametrize("bits", NANS)
def test_a_loss_that_is_not_finite_shows(bits):
    z = draw(2, 64)
    z[1, 5] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    nll, d_z = loss.nll_of(z, torch.tensor([0, 1]), Target(), torch.float32)
    assert nll[0].isfinite()
    assert d_z[0].isfinite().all()
    assert nll[1].isnan()
    assert d_z[1].isnan().all()


def test_labels_of_any_kind_are_read_as_they_are():
    head, hidden = Head(draw(64, 48, seed=1)), draw(4, 48)
    labels = torch.arange(8, dtype=torch.int32)[::2]
    expected = torch.nn.functional.cross_entropy(hidden @ head.values.T, labels.long(), reduction="none")
    torch.testing.assert_close(LinearCrossEntropy.apply(hidden, head, labels, Target()), expected)


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_rows_are_shared_whatever_their_number(monkeypatch, threads):
    monkeypatch.setattr(team, "threads", lambda: threads)
    monkeypatch.setattr(compiled, "WORTH_A_THREAD", 16)
    gate, up = draw(37, 32), draw(37, 32, seed=1)
    torch.testing.assert_close(swiglu(gate, up), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multiplier", [1.0, 0.22])
def test_the_residual_stream(dtype, multiplier):
    x, y = draw(37, 160), draw(37, 160, dtype=dtype, seed=1)
    found = with_gradients(lambda a, b: Residual.apply(a, b, multiplier), [x, y])
    exact = x.double() + multiplier * y.double(), draw(37, 160, seed=9), draw(37, 160, seed=9) * multiplier
    for ours, theirs in zip(found, exact, strict=True):
        assert_near(ours, theirs.float())


@pytest.mark.parametrize("n", [1, 15, 16, 17, 1000])
def test_narrowing_is_torch_s(n):
    wide, narrow = draw(n, scale=100.0), torch.zeros(n + 1, dtype=torch.bfloat16)
    load.library().narrow_row(wide.data_ptr(), narrow.data_ptr(), n)
    assert torch.equal(narrow[:n], wide.bfloat16())
    assert narrow[n] == 0  # nothing behind the end


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_is_torch_s_bit_for_bit(monkeypatch, dtype):
    weight = quantize_nf4(draw(70, 96))
    found = [weight.rows(first, last, dtype).clone() for first, last in ((0, 70), (3, 40), (69, 70))]
    through_torch(monkeypatch)
    for ours, (first, last) in zip(found, ((0, 70), (3, 40), (69, 70)), strict=True):
        assert torch.equal(ours, weight.rows(first, last, dtype))


@pytest.mark.skipif(not products.exist(torch.bfloat16), reason="this CPU lacks AVX512-BF16")
def test_logits_of_narrow_products_are_float32():
    """Rounded are only what is multiplied: far less than logits in bfloat16 are off by."""
    head, hidden = draw(200, 64, seed=3), draw(9, 64, seed=4, scale=3.0)
    weight, exact = Dense(head), hidden @ head.T
    found = loss.logits_of(hidden, weight, Target(compute=torch.bfloat16), torch.empty(9, 200))
    assert not torch.equal(found, exact)
    assert (found - exact).norm() < 2**-8 * exact.norm()
    torch.testing.assert_close(loss.logits_of(hidden, weight, Target(), torch.empty(9, 200)), exact)
