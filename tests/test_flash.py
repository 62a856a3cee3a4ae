"""The compiled attention: that of torch tile by tile, for every shape, width, share of the work and kind of score."""

from __future__ import annotations

import ctypes
import shutil

import pytest
import torch

from edgelora import team
from edgelora.kernels import load
from edgelora.nn import attention, compiled, flash
from edgelora.nn.attention import SegmentAttention
from edgelora.nn.scores import Scores
from edgelora.training.settle import choose_attention

needs_compiler = pytest.mark.skipif(load.library() is None, reason="no compiler was here at installation")

SHAPES = [(9, 3, 64), (4, 4, 96), (8, 1, 16), (2, 1, 256), (5, 5, 80)]
HOW = [Scores(0.2), Scores(0.2, window=33), Scores(0.3, softcap=2.5), Scores(0.3, window=70, softcap=1.5)]
LAYOUTS = [
    ([0, 1], 0),
    ([0, 300], 0),
    ([0, 64, 65, 65, 193, 300], 0),
    ([20, 100, 300], 20),
    ([130, 131, 190, 300], 130),
]


def draw(n: int, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """q, k, v and a gradient of the output."""
    heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(n + dim)
    sizes = [(n, h, dim) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def both(q, k, v, d_out, starts, prefix, how):
    """(output, gradients) of the compiled code, and of torch's."""
    borders = [0, *starts] if prefix else starts
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = SegmentAttention.apply(*inputs, starts, prefix, how)
    found = out.detach(), *torch.autograd.grad(out, inputs, d_out)
    expected = attention._forward(q, k, v, borders, prefix, how)
    return found, (expected, *attention._backward(q, k, v, d_out, borders, prefix, how))


def test_it_was_compiled():
    if not shutil.which("cc"):
        pytest.skip("there is no C compiler here")
    assert load.library() is not None, "install again: pip install -e ."


@needs_compiler
@pytest.mark.parametrize(("starts", "prefix"), LAYOUTS)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_torch_s_tile_by_tile(shape, how, starts, prefix):
    found, expected = both(*draw(starts[-1], shape), starts, prefix, how)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize(("starts", "prefix"), LAYOUTS[1:4])
def test_any_number_of_threads_shares_the_work(monkeypatch, threads, starts, prefix):
    monkeypatch.setattr(flash, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(team, "threads", lambda: threads)
    found, expected = both(*draw(starts[-1], SHAPES[0]), starts, prefix, HOW[1])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


@needs_compiler
def test_the_same_bits_each_time():
    case = (*draw(300, SHAPES[0]), *LAYOUTS[3], HOW[0])
    for one, other in zip(both(*case)[0], both(*case)[0], strict=True):
        assert torch.equal(one, other)


@needs_compiler
@pytest.mark.parametrize(("starts", "prefix"), LAYOUTS)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("shape", SHAPES)
def test_of_bfloat16_only_factors_are_rounded(shape, how, starts, prefix):
    """Not the sums: each factor is off by at most 2⁻⁹ of itself, and so is what is written."""
    narrow = draw(starts[-1], shape, torch.bfloat16)
    found, _ = both(*narrow, starts, prefix, how)
    _, exact = both(*(x.float() for x in narrow), starts, prefix, how)
    for ours, wide in zip(found, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - wide).norm() <= 2**-8 * wide.norm() + 1e-5


@needs_compiler
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7F800001, -1, 0x7F800000])
@pytest.mark.parametrize("dtype", compiled.NARROW)
def test_what_is_not_finite_shows(bits, dtype):
    """NaN with anything in its lowest bits, and infinity."""
    q, k, v, d_out = draw(100, SHAPES[0])
    k[50, 0] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    found, _ = both(*(x.to(dtype) for x in (q, k, v, d_out)), [0, 40, 100], 0, HOW[0])
    assert not found[0][50:, :3].isfinite().any(-1).any()
    assert all(x[:40].isfinite().all() for x in found)  # nothing of it reaches another segment
    assert found[0][:, 3:].isfinite().all()  # or another head


@needs_compiler
def test_bfloat16_is_written_to_the_nearest_and_keeps_nan():
    """One token alone gives its value back: whatever bits that has."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = bits[~(bits.isinf() | (bits.abs() < 1e-30))].view(torch.int16)
    values = values[: len(values) // 16 * 16].view(torch.bfloat16).view(-1, 1, 16)
    q = torch.zeros_like(values)
    out = SegmentAttention.apply(q, q, values, list(range(len(values) + 1)), 0, HOW[0])
    torch.testing.assert_close(out, values, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float64, 64), (torch.float16, 64), (torch.float32, 24)])
def test_torch_does_the_rest(dtype, dim):
    q, k, v, d_out = draw(30, (4, 2, dim), dtype)
    assert not compiled.usable(q, k, v)
    found, expected = both(q, k, v, d_out, [0, 12, 30], 0, HOW[0])
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_torch_does_it_without_a_compiler(monkeypatch):
    monkeypatch.setattr(load, "library", lambda: None)
    found, expected = both(*draw(300, SHAPES[0]), *LAYOUTS[3], HOW[0])
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@needs_compiler
def test_the_structure_is_that_of_the_c_code():
    assert ctypes.sizeof(flash._Attention) == load.library().attention_bytes()


@pytest.mark.parametrize(
    ("dim", "device", "compiler", "value", "why"),
    [
        (64, "cpu", True, "compiled", "flash attention for this CPU"),
        (64, "cpu", False, "torch", "was not compiled"),
        (24, "cpu", True, "torch", "a multiple of 16"),
        (64, "cuda", True, "torch", "not for cuda"),
    ],
)
def test_who_computes_it_is_chosen_and_explained(monkeypatch, dim, device, compiler, value, why):
    monkeypatch.setattr(load, "library", lambda: object() if compiler else None)
    choice = choose_attention(dim, device)
    assert choice.value == value
    assert why in choice.why
