"""NF4 against bitsandbytes' CPU code, bit for bit: codes, scales, dequantized floats."""

from __future__ import annotations

import pytest
import torch

from edgelora.base import nf4
from edgelora.base.nf4 import NF4, quantize_nf4
from edgelora.errors import BaseModelError
from edgelora.nn.linear import FrozenLinear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# (d_out, d_in): whole blocks; rows that are no multiple of 64; of odd width; less than a block; more than one chunk
SHAPES = [(96, 256), (576, 576), (33, 80), (100, 77), (7, 31), (1, 1), (520, 1024)]


@pytest.fixture(scope="module")
def bitsandbytes():
    """The oracle's functions."""
    pytest.importorskip("bitsandbytes", reason="the oracle of NF4 is not installed")
    import bitsandbytes.functional

    return bitsandbytes.functional


def weights(shape, dtype=torch.float32, seed=0):
    """Normal floats whose rows differ in size by a factor of a thousand, with a row of zeros and a lone outlier."""
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=draw) * torch.logspace(-2, 1, shape[0])[:, None]
    w[shape[0] // 2] = 0
    w[-1, -1] = 30
    return w.to(dtype)


def theirs(bitsandbytes, weight):
    """As one row: their AVX-512 kernel starts a block at every row, where their quantizer goes on (0.50.2)."""
    return bitsandbytes.quantize_4bit(weight.reshape(1, -1), blocksize=64, quant_type="nf4", compress_statistics=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_and_scales_are_those_of_bitsandbytes(bitsandbytes, shape, dtype):
    weight = weights(shape, dtype)
    codes, state = theirs(bitsandbytes, weight)
    ours = quantize_nf4(weight)
    assert torch.equal(ours.codes.view(-1)[: codes.numel()], codes.view(-1))
    assert torch.equal(ours.scale_codes.view(-1)[: state.absmax.numel()], state.absmax)
    assert torch.equal(ours.scale_of_scales, state.state2.absmax)
    assert torch.equal(ours.offset, state.offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantized_floats_are_those_of_bitsandbytes(bitsandbytes, shape, dtype):
    weight = weights(shape, dtype)
    expected = bitsandbytes.dequantize_4bit(*theirs(bitsandbytes, weight))
    found = quantize_nf4(weight).dequantize(dtype)
    assert found.dtype == dtype
    assert torch.equal(found, expected.view(shape))


def test_scales_round_as_those_of_bitsandbytes_do(bitsandbytes):
    """A million scales: some lie so close to the middle of two codes that only the same roundings choose alike."""
    scales = torch.rand(1_000_003, generator=torch.Generator().manual_seed(1))
    expected, state = bitsandbytes.quantize_blockwise(scales - scales.mean(), blocksize=256)
    codes, outer, _ = nf4._quantize_scales(scales)
    assert torch.equal(codes.view(-1)[: len(scales)], expected)
    assert torch.equal(outer, state.absmax)


def test_levels_of_the_scales_are_those_of_bitsandbytes(bitsandbytes):
    assert torch.equal(nf4._dynamic_map(torch.device("cpu")), bitsandbytes.create_dynamic_map())


def test_the_even_weight_is_in_the_high_nibble():
    row = torch.zeros(1, 64)
    row[0, 0], row[0, 1] = 1.0, -1.0
    packed = quantize_nf4(row)
    assert packed.codes[0, 0] == 0xF0  # level 15 is 1.0, level 0 is -1.0
    assert (packed.codes[0, 1:] == 0x77).all()  # level 7 is 0.0


def test_a_block_is_exact_to_half_a_step_of_its_levels():
    weight = weights((64, 256))
    error = (quantize_nf4(weight).dequantize() - weight).abs().view(-1, 64)
    peak = weight.abs().view(-1, 64).amax(1)
    # the widest gap of the levels is 0.304; a scale is off by at most a 128th of its own range
    assert (error <= 0.304 / 2 * peak[:, None] + peak.max() / 64).all()
    assert error.max() > 0


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("blocks_at_once", [5, 32, 8192])
@pytest.mark.parametrize("shape", [(96, 256), (100, 77)], ids=str)
def test_threads_and_parts_do_not_change_the_floats(shape, blocks_at_once, threads, monkeypatch):
    weight, before = quantize_nf4(weights(shape)), torch.get_num_threads()
    expected = weight.gather(torch.arange(shape[0]))  # looks up one weight at a time
    monkeypatch.setattr(nf4, "BLOCKS_AT_ONCE", blocks_at_once)
    monkeypatch.setattr(nf4, "ELEMENTS_PER_THREAD", 1 if threads > 1 else 1 << 40)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(weight.dequantize(), expected)
        assert torch.equal(weight.rows(1, 9), expected[1:9])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_rows_of_the_whole(shape):
    weight = quantize_nf4(weights(shape))
    whole, n = weight.dequantize().clone(), shape[0]
    for first, last in [(0, n), (n // 3, n // 2 + 1), (n - 1, n), (n, n)]:
        assert torch.equal(weight.rows(first, last), whole[first:last])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gathered_rows_are_rows_of_the_whole_in_their_own_memory(shape):
    weight = quantize_nf4(weights(shape))
    ids = torch.tensor([shape[0] - 1, 0, shape[0] // 2, 0])
    gathered = weight.gather(ids)
    whole = weight.dequantize()
    assert torch.equal(gathered, whole[ids])
    assert gathered.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()


def test_dequantized_floats_lie_in_the_scratch_buffer():
    one, two = quantize_nf4(weights((96, 256))), quantize_nf4(weights((96, 256), seed=1))
    assert one.dequantize().data_ptr() == two.dequantize().data_ptr()


def test_its_size_is_4_127_bits_a_weight():
    weight = quantize_nf4(weights((1024, 1024)))
    assert weight.shape == (1024, 1024)
    # 4 bits of code; 8 bits of scale for 64; 32 bits for 64 * 256; one offset
    assert weight.size_bytes == 2**20 // 2 + 2**20 // 64 + 2**20 // 64 // 256 * 4 + 4


def test_a_linear_layer_over_it_is_one_over_its_floats():
    weight = quantize_nf4(weights((96, 256)))
    dense = weight.dequantize().clone()
    x = torch.randn(5, 256, requires_grad=True)
    y = FrozenLinear.apply(x, weight)
    torch.testing.assert_close(y, x @ dense.T, rtol=1e-4, atol=1e-3)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, dense.sum(0).expand(5, 256), rtol=1e-4, atol=1e-3)


def test_moving_it_keeps_its_floats():
    weight = quantize_nf4(weights((33, 80)))
    moved = weight.to("cpu")
    assert isinstance(moved, NF4)
    assert torch.equal(moved.dequantize(), weight.dequantize())


def test_quantizing_makes_no_second_copy(monkeypatch):
    """The largest tensor alive beside the weight is a chunk, whatever the weight's size."""
    largest = 0
    nearest = nf4._nearest

    def spy(normed):
        nonlocal largest
        largest = max(largest, normed.numel())
        return nearest(normed)

    monkeypatch.setattr(nf4, "_nearest", spy)
    monkeypatch.setattr(nf4, "QUANTIZED_AT_ONCE", 16)
    weight = weights((256, 256), torch.bfloat16)
    in_parts = quantize_nf4(weight)
    assert largest == 16 * 64
    monkeypatch.undo()
    assert torch.equal(in_parts.codes, quantize_nf4(weight).codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad):
    weight = weights((8, 64))
    weight[3, 5] = bad
    with pytest.raises(BaseModelError) as e:
        quantize_nf4(weight)
    assert e.value.what == "the weights hold NaN or infinity"
    assert "the whole matrix" in e.value.why
    assert "download" in e.value.fix
