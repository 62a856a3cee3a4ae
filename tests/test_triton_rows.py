"""What lies between products by Triton, against the same formulas in float64: compiled on a GPU, else interpreted."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from edgelora.nn.gpu import has_triton

pytest.importorskip("triton", reason="triton is not installed")

COMPILED = torch.cuda.is_available() and has_triton(torch.device("cuda", 0))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = pytest.mark.skipif(
    not COMPILED and not INTERPRETED, reason="test_in_the_interpreter runs it where there is no GPU"
)
DEVICE = "cuda" if COMPILED else "cpu"
NARROW = torch.bfloat16 if COMPILED else torch.float16  # the interpreter cuts floats off to make bfloat16 of them
CLOSE = {torch.float32: {"rtol": 2e-6, "atol": 2e-6}, torch.float16: {"rtol": 1e-3, "atol": 1e-3},
         torch.bfloat16: {"rtol": 8e-3, "atol": 8e-3}}  # fmt: skip

if COMPILED or INTERPRETED:
    from edgelora.nn import triton_rows as kernels


@pytest.mark.skipif(COMPILED or INTERPRETED, reason="these tests run on the GPU")
def test_in_the_interpreter():
    """In a process of its own: sums of Triton's own language ask for it when Triton is first imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__], capture_output=True, text=True,
        timeout=300, check=False, env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert "....." in done.stdout  # not all of them skipped


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def same(found, expected):
    torch.testing.assert_close(found.double(), expected.double(), **CLOSE[found.dtype])


def graph(x):
    return x.double().detach().requires_grad_()


@HERE
@pytest.mark.parametrize(("wide", "narrow"), [(torch.float32, torch.float32), (torch.float32, NARROW), (NARROW,) * 2])
@pytest.mark.parametrize("shape", [(5, 576), (3, 2, 64), (2, 100)], ids=str)
def test_rms_norm(shape, wide, narrow):
    x, dy, w = drawn(*shape, dtype=wide), drawn(*shape, dtype=narrow, seed=1), drawn(shape[-1], seed=2)
    y, inverse_rms = kernels.rms_norm(x, w, 1e-5, narrow)
    again = graph(x)
    expected = again * (again.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w.double()
    assert (y.dtype, inverse_rms.shape) == (narrow, (*shape[:-1], 1))
    same(y, expected)
    (expected_dx,) = torch.autograd.grad(expected, again, dy.double())
    for kept, is_output in ((x, False), (y, True)):
        dx = kernels.rms_norm_backward(dy, kept, w, inverse_rms, wide, is_output)
        assert dx.dtype == wide
        if is_output and narrow == NARROW:  # y was rounded before it was kept
            assert (dx.double() - expected_dx).norm() < 2**-7 * expected_dx.norm()
        else:
            same(dx, expected_dx)


@HERE
@pytest.mark.parametrize("dtype", [torch.float32, NARROW], ids=str)
@pytest.mark.parametrize("gelu", [False, True], ids=["silu", "gelu"])
def test_gated_units(gelu, dtype):
    """Both halves of one matrix, as phi3 has them, are rows that lie apart."""
    gate, up = drawn(7, 2 * 1100, dtype=dtype).chunk(2, dim=-1)
    dy = drawn(7, 1100, dtype=dtype, seed=1)
    gates, ups = graph(gate), graph(up)
    expected = (F.gelu(gates, approximate="tanh") if gelu else F.silu(gates)) * ups
    same(kernels.gated(gate, up, gelu), expected)
    for found, wanted in zip(
        kernels.gated_backward(dy, gate, up, gelu),
        torch.autograd.grad(expected, (gates, ups), dy.double()),
        strict=True,
    ):
        assert found.is_contiguous()
        same(found, wanted)


@HERE
@pytest.mark.parametrize("dtype", [torch.float32, NARROW], ids=str)
@pytest.mark.parametrize(("heads", "dim", "half"), [(9, 64, 32), (2, 80, 20), (17, 32, 16)])
def test_rotation(heads, dim, half, dtype):
    """Of whole heads and of parts of them; and the rotation back."""
    x = drawn(5, heads * dim + 8, dtype=dtype)[:, : heads * dim].unflatten(1, (heads, dim))
    angles = drawn(5, 1, half, seed=1)
    cos, sin = angles.cos(), angles.sin()
    found = kernels.rotary(x, cos, sin, 1.0)
    wide, c, s = x.double(), cos.double(), sin.double()
    one, two, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    same(found, torch.cat([one * c - two * s, two * c + one * s, rest], -1))
    same(kernels.rotary(found, cos, sin, -1.0), wide)


@HERE
@pytest.mark.parametrize("vocabulary", [512, 4097, 9000])
@pytest.mark.parametrize("narrow", [False, True])
def test_cross_entropy(vocabulary, narrow):
    if narrow and not COMPILED:
        pytest.skip("the interpreter cuts the lower half of a float off to make a bfloat16 of it (triton 3.9)")
    z = drawn(6, vocabulary) * 5
    z[2, 7] = 300.0  # certain, and its exponential no float32
    labels = torch.tensor([0, vocabulary - 1, 7, 3, 7, 100], device=DEVICE)
    logits = graph(z)
    expected = F.cross_entropy(logits, labels, reduction="none")
    (expected_dz,) = torch.autograd.grad(expected.sum(), logits)
    nll, d_z = kernels.cross_entropy(z, labels, narrow)
    same(nll, expected)
    assert d_z.data_ptr() == z.data_ptr()
    assert d_z.dtype == (torch.bfloat16 if narrow else torch.float32)
    same(d_z, expected_dz)
