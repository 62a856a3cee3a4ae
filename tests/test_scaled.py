"""Columns times a trained factor each (nn/scaled.py): torch's product and gradients, rounded once."""

from __future__ import annotations

import pytest
import torch

from edgelora.nn.scaled import scaled


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_it_is_torchs_product(dtype, error):
    draw = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(20, 32, generator=draw).to(dtype).requires_grad_(i == 0) for i in range(2))
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    factor = torch.randn(32, generator=draw).to(kind).requires_grad_()
    y = scaled(x, factor)
    dx, d_factor = torch.autograd.grad(y, (x, factor), dy)
    exact = (x.double() * factor.double(), dy.double() * factor.double(), (dy.double() * x.double()).sum(0))
    assert [one.dtype for one in (y, dx, d_factor)] == [dtype, dtype, kind]
    for found, wanted in zip((y, dx), exact, strict=False):
        torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=error)
    torch.testing.assert_close(d_factor.double(), exact[2], atol=1e-5, rtol=1e-5)


def test_what_needs_no_gradient_has_none():
    x, factor = torch.randn(4, 8), torch.randn(8, requires_grad=True)
    scaled(x, factor).sum().backward()
    assert x.grad is None
    assert factor.grad is not None
