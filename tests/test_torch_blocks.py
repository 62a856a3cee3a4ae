"""Blocks dequantized by torch alone against ggml's own kernels, bit for bit; and with operations that MPS has."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from edgelora.base import ggml
from edgelora.base.nf4 import quantize_nf4
from edgelora.base.torch_blocks import DEQUANTIZE, DeviceBlocks, dequantize_blocks
from edgelora.base.weights import Dense, GGUFBlocks, from_rows
from edgelora.errors import BaseModelError

COLUMNS = 512
BY_NAME = {"ids": lambda kind: kind.name}
LAST_BIT = {"rtol": 1e-6, "atol": 1e-6}  # see WITH_MINIMUM
WITH_MINIMUM = (Type.Q4_1, Type.Q5_1, Type.Q2_K, Type.Q4_K, Type.Q5_K)  # a compiler may contract d * q - m


def random_blocks(kind):
    """Any bytes are blocks: every code occurs, and scales that are subnormal, huge, infinite and NaN."""
    return np.random.default_rng(2).integers(0, 256, (64, ggml.row_bytes(kind, COLUMNS)), np.uint8)


def real_blocks(kind):
    draw = np.random.default_rng(0)
    weights = (draw.normal(0, 1, (12, COLUMNS)) * np.logspace(-3, 1, 12)[:, None]).astype(np.float32)
    return ggml.quantize(weights, kind)


def bits(floats):
    """The floats as integers, so that equal is equal to the last bit; all NaNs are one."""
    return np.where(np.isnan(floats), np.float32(np.nan), floats).astype(np.float32).view(np.uint32)


def test_the_types_are_those_the_product_promises():
    promised = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS"
    assert [kind.name for kind in DEQUANTIZE] == promised.split()


@pytest.mark.parametrize("make", [random_blocks, real_blocks])
@pytest.mark.parametrize("kind", DEQUANTIZE, **BY_NAME)
def test_floats_are_those_of_gguf_py(kind, make):
    blocks = make(kind)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, kind)
    found = dequantize_blocks(torch.from_numpy(blocks), kind, COLUMNS)
    np.testing.assert_array_equal(bits(found.numpy()), bits(expected))


@pytest.mark.parametrize("kind", DEQUANTIZE, **BY_NAME)
def test_floats_are_those_of_ggml(kind):
    blocks = real_blocks(kind)
    expected = ggml.dequantize(blocks, kind, COLUMNS)
    found = dequantize_blocks(torch.from_numpy(blocks), kind, COLUMNS).numpy()
    if kind in WITH_MINIMUM and (bits(expected) != bits(gguf.quants.dequantize(blocks, kind))).any():
        # this ggml was compiled to contract d * q - m, which gguf-py and torch round twice
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    else:
        np.testing.assert_array_equal(bits(found), bits(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", DEQUANTIZE, **BY_NAME)
def test_other_types_are_rounded_once(kind, dtype):
    blocks = torch.from_numpy(real_blocks(kind))
    found = dequantize_blocks(blocks, kind, COLUMNS, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, dequantize_blocks(blocks, kind, COLUMNS).to(dtype))


@pytest.mark.parametrize("kind", DEQUANTIZE, **BY_NAME)
def test_a_weight_on_a_device_is_the_weight_in_the_file(kind):
    blocks = real_blocks(kind)
    there, here = DeviceBlocks(torch.from_numpy(blocks), kind, COLUMNS), GGUFBlocks(blocks, kind, COLUMNS)
    assert (there.shape, there.size_bytes) == (here.shape, here.size_bytes)
    ids = torch.tensor([3, 0, 3])
    torch.testing.assert_close(there.dequantize(), here.dequantize(), **LAST_BIT)
    torch.testing.assert_close(there.dequantize(torch.bfloat16), here.dequantize(torch.bfloat16), rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(there.rows(2, 5), here.rows(2, 5), **LAST_BIT)
    torch.testing.assert_close(there.gather(ids), here.gather(ids), **LAST_BIT)


def test_weights_move_to_a_device():
    """`meta` stands for a GPU: it has shapes and devices, and no memory."""
    q4 = from_rows(real_blocks(Type.Q4_K), Type.Q4_K, COLUMNS)
    moved = q4.to("meta")
    assert isinstance(moved, DeviceBlocks)
    assert moved.blocks.device.type == "meta"
    assert (moved.shape, moved.size_bytes) == (q4.shape, q4.size_bytes)
    assert moved.dequantize(torch.bfloat16).shape == (12, COLUMNS)
    assert q4.to("cpu") is q4
    dense = from_rows(ggml.quantize(np.ones((2, 64), np.float32), Type.F16), Type.F16, 64).to("meta")
    assert isinstance(dense, Dense)
    assert (dense.values.device.type, dense.rows(0, 1).dtype) == ("meta", torch.float32)


def test_no_rows_are_no_rows():
    assert dequantize_blocks(torch.empty(0, 288, dtype=torch.uint8), Type.Q4_K, COLUMNS).shape == (0, COLUMNS)


@pytest.mark.parametrize("kind", sorted(set(ggml.DEQUANTIZE) - set(DEQUANTIZE)), **BY_NAME)
def test_a_type_without_device_code_is_refused_when_it_moves(kind):
    weight = GGUFBlocks(np.zeros((2, ggml.row_bytes(kind, COLUMNS)), np.uint8), kind, COLUMNS)
    with pytest.raises(BaseModelError) as e:
        weight.to("meta")
    assert e.value.what == f"weights of type {kind.name} cannot be used on a GPU"
    assert "Q4_K" in e.value.why
    assert "CPU" in e.value.fix


@pytest.mark.parametrize("shape", [(2, 33), (2, 35), (2, 2, 17)])
def test_blocks_of_another_width_are_refused(shape):
    with pytest.raises(ValueError, match="are not rows of 32 Q8_0 weights"):
        dequantize_blocks(torch.zeros(shape, dtype=torch.uint8), Type.Q8_0, 32)


# -- other devices: NF4's torch code, and torch's own list of what MPS has


@pytest.mark.parametrize("shape", [(33, 80), (100, 77), (1, 1)], ids=str)
def test_nf4_on_a_device_is_nf4_on_the_cpu(shape):
    weight = quantize_nf4(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    n = len(weight.codes)
    for first, last in [(0, n), (n // 3, n // 2 + 1), (n, n)]:
        assert torch.equal(weight._blocks_on_device(first, last), weight._blocks(first, last))
    moved = weight.to("meta")
    assert (moved.rows(0, 1).device.type, moved.dequantize(torch.bfloat16).shape) == ("meta", shape)


class Recorded(TorchDispatchMode):
    """The operations that run, and the types of what they give."""

    def __init__(self):
        super().__init__()
        self.names, self.dtypes = set(), set()

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.names.add(function.name().removeprefix("aten::"))
        self.dtypes |= {leaf.dtype for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)}
        return out


def mps_operations():
    """Of torch's list of operations, those with a version for MPS, and those written for any device."""
    torchgen = pytest.importorskip("torchgen", reason="this torch comes without its list of operations")
    yaml = pytest.importorskip("yaml", reason="PyYAML, to read torch's list of operations, is not installed")
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    own, shared = set(), set()
    entries = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    rows = {entry["func"].partition("(")[0]: entry for entry in entries}
    for name, entry in rows.items():
        keys = ",".join(rows[entry.get("structured_delegate", name)].get("dispatch") or ["Composite"])
        if "MPS" in keys:
            own.add(name)
        elif "Composite" in keys:
            shared.add(name)
    return own, shared


# Written for any device: views, copies and what makes tensors; and those that call an operation which MPS has.
ANYWHERE = {
    "_to_copy", "_unsafe_view", "arange", "clone", "copy_", "detach", "lift_fresh", "slice.Tensor",
    "split_with_sizes", "transpose.int", "unsqueeze", "view.dtype",
}  # fmt: skip
CALLS = {"bitwise_and.Scalar": "bitwise_and.Tensor_out", "remainder.Scalar": "remainder.Tensor", "stack": "cat"}


def test_mps_has_every_operation():
    """`>>` of bytes, which was wrong on MPS before torch 2.6 (pytorch#144190), is among them."""
    own, shared = mps_operations()
    ids = torch.tensor([1, 0])
    nf4 = quantize_nf4(torch.randn(4, 100, generator=torch.Generator().manual_seed(0)))
    weights = [DeviceBlocks(torch.from_numpy(real_blocks(kind)), kind, COLUMNS) for kind in DEQUANTIZE]
    with Recorded() as ran:
        for weight in weights:
            weight.dequantize(torch.bfloat16), weight.rows(0, 2), weight.gather(ids)
        nf4._blocks_on_device(1, 3).to(torch.bfloat16), nf4.gather(ids)
    assert ran.names & own >= {"__rshift__.Scalar", "bitwise_or.Tensor", "index_select", "mul_.Tensor"}
    others = ran.names - own
    assert others <= shared
    assert others <= ANYWHERE | set(CALLS)
    assert {CALLS[name] for name in others & set(CALLS)} <= own
    assert torch.float64 not in ran.dtypes
