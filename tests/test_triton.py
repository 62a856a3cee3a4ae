"""Triton's kernels against the CPU's code: ggml's for blocks and our own for NF4, which is bitsandbytes' bit for bit.

Where there is a GPU they run compiled, elsewhere in Triton's interpreter; compiled for GPUs they are everywhere.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type

from edgelora.base import ggml, nf4, torch_blocks
from edgelora.base.nf4 import quantize_nf4
from edgelora.base.products import has_triton
from edgelora.base.torch_blocks import DeviceBlocks
from edgelora.base.weights import GGUFBlocks
from edgelora.nn import gpu

pytest.importorskip("triton", reason="triton is not installed")

COMPILED = torch.cuda.is_available() and has_triton(torch.device("cuda"))
DEVICE = torch.empty(0, device="cuda" if COMPILED else "cpu").device  # with its index, as tensors have it

with pytest.MonkeyPatch.context() as patch:
    if not COMPILED:
        patch.setenv("TRITON_INTERPRET", "1")  # it is asked where a kernel is defined
    from edgelora.base import triton_blocks, triton_matmul

KINDS = list(triton_blocks.DECODE)
BY_NAME = {"ids": lambda kind: kind.name}
SHAPES = [(96, 256), (33, 80), (100, 77), (7, 31), (1, 1), (70, 1024)]  # of NF4: rows of whole blocks, and not


def bits(floats):
    """The floats as integers, so that equal is equal to the last bit; all NaNs are one."""
    floats = np.asarray(floats, np.float32)
    return np.where(np.isnan(floats), np.float32(np.nan), floats).view(np.uint32)


def blocks_of(kind, n_rows, columns, seed=0):
    draw = np.random.default_rng(seed)
    weights = draw.normal(0, 1, (n_rows, columns)) * np.logspace(-3, 1, n_rows)[:, None]
    return ggml.quantize(weights.astype(np.float32), kind)


def stored(blocks, kind, columns):
    return triton_blocks.of_blocks(torch.from_numpy(blocks).to(DEVICE), kind, columns)


def nf4_weight(shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return quantize_nf4(torch.randn(shape, generator=draw) * torch.logspace(-2, 1, shape[0])[:, None])


def stored_nf4(weight):
    weight = weight.to(DEVICE)
    tables = nf4._levels(DEVICE), nf4._dynamic_map(DEVICE)
    parts = (weight.codes, weight.scale_codes, weight.scale_of_scales, weight.offset)
    return triton_blocks.of_nf4(weight.shape, *parts, *tables)


def any_weight(kind, d_out, d_in):
    return stored_nf4(nf4_weight((d_out, d_in))) if kind == "NF4" else stored(blocks_of(kind, d_out, d_in), kind, d_in)


@pytest.fixture
def on_triton(monkeypatch):
    """DeviceBlocks and NF4 take this machine's device for one that has Triton."""
    for module in (torch_blocks, nf4):
        monkeypatch.setattr(module, "has_triton", lambda device: device == DEVICE)


# -- dequantizing


@pytest.mark.parametrize("kind", KINDS, **BY_NAME)
def test_floats_are_those_of_ggml(kind):
    blocks = blocks_of(kind, 13, 768)
    expected = ggml.dequantize(blocks, kind, 768)
    found = triton_blocks.dequantize(stored(blocks, kind, 768)).cpu().numpy()
    if kind == Type.Q4_K and (bits(expected) != bits(gguf.quants.dequantize(blocks, kind))).any():
        # this ggml was compiled to contract d * q - m, which gguf-py, torch and Triton round twice
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    else:
        np.testing.assert_array_equal(bits(found), bits(expected))


@pytest.mark.parametrize("kind", KINDS, **BY_NAME)
def test_floats_of_any_bytes_are_those_of_gguf_py(kind):
    """Every code occurs, and scales that are subnormal, huge, infinite and NaN."""
    blocks = np.random.default_rng(2).integers(0, 256, (65, ggml.row_bytes(kind, 512)), np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, kind)
        found = triton_blocks.dequantize(stored(blocks, kind, 512))
    np.testing.assert_array_equal(bits(found.cpu()), bits(expected))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_floats_of_nf4_are_those_of_the_cpu(shape):
    weight = nf4_weight(shape)
    assert torch.equal(triton_blocks.dequantize(stored_nf4(weight)).cpu(), weight.dequantize())


def rounded(exact, dtype):
    """What a GPU rounds to. The interpreter cuts the lower half of a float off to make a bfloat16 of it."""
    if COMPILED or dtype != torch.bfloat16:
        return exact.to(dtype)
    return (exact.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "NF4"], ids=str)
def test_other_types_are_rounded_once(kind, dtype):
    weight = any_weight(kind, 9, 512)
    found = triton_blocks.dequantize(weight, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, rounded(triton_blocks.dequantize(weight), dtype))


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_of_nf4_are_rows_of_the_whole(shape):
    here, n = nf4_weight(shape), shape[0]
    there, whole = here.to(DEVICE), here.dequantize().clone()
    for first, last in [(0, n), (n // 3, n // 2 + 1), (n - 1, n), (n, n)]:
        assert torch.equal(there.rows(first, last).cpu(), whole[first:last])
    assert torch.equal(there.dequantize().cpu(), whole)
    assert torch.equal(there.rows(0, n, torch.float16).cpu(), whole.half())


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("kind", KINDS, **BY_NAME)
def test_a_weight_on_a_device_is_the_weight_in_the_file(kind, monkeypatch):
    blocks, calls = blocks_of(kind, 11, 512), []
    there, here = DeviceBlocks(torch.from_numpy(blocks).to(DEVICE), kind, 512), GGUFBlocks(blocks, kind, 512)
    dequantize = triton_blocks.dequantize
    monkeypatch.setattr(triton_blocks, "dequantize", lambda *a: calls.append(a) or dequantize(*a))
    ids = torch.tensor([3, 0, 10, 3])
    close = {"rtol": 1e-6, "atol": 1e-6}  # where this ggml contracts d * q - m, see above
    torch.testing.assert_close(there.dequantize().cpu(), here.dequantize(), **close)
    torch.testing.assert_close(there.rows(2, 5).cpu(), here.rows(2, 5), **close)
    torch.testing.assert_close(there.rows(2, 5, torch.float16).cpu(), here.rows(2, 5).half(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(there.gather(ids.to(DEVICE)).cpu(), here.gather(ids), **close)
    assert (there.rows(4, 4).shape, len(calls)) == ((0, 512), 5)


# -- products


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_tokens", [1, 40, 130])
@pytest.mark.parametrize("kind", [*KINDS, "NF4"], ids=str)
def test_products_are_those_of_the_dense_weight(kind, n_tokens, dtype):
    """70 rows and, where blocks are that short, 288 columns: neither is a multiple of a tile."""
    if dtype == torch.bfloat16 and not COMPILED:
        pytest.skip("the interpreter multiplies the bits of bfloat16 as if they were integers (triton 3.9)")
    d_out, d_in = 70, 256 if kind in (Type.Q4_K, Type.Q6_K) else 288
    weight = (
        stored_nf4(nf4_weight((d_out, d_in))) if kind == "NF4" else stored(blocks_of(kind, d_out, d_in), kind, d_in)
    )
    draw = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(n_tokens, d, generator=draw).to(DEVICE, dtype) for d in (d_in, d_out))
    dense = triton_blocks.dequantize(weight, dtype).double()
    places = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for found, expected in [
        (triton_matmul.times_transposed(x, weight, "fused"), x.double() @ dense.T),
        (triton_matmul.times(dy, weight, "fused"), dy.double() @ dense),
    ]:
        assert found.dtype == dtype
        # a sum of d terms is off by the rounding of its result, and by float32's of its parts
        torch.testing.assert_close(found.double(), expected, rtol=places, atol=3e-5 * float(expected.abs().max()))


def test_a_product_takes_rows_that_do_not_lie_together():
    weight = stored(blocks_of(Type.Q8_0, 64, 64), Type.Q8_0, 64)
    wide = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    half = wide[:, ::2]
    assert torch.equal(
        triton_matmul.times_transposed(half, weight, "fused"),
        triton_matmul.times_transposed(half.contiguous(), weight, "fused"),
    )


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("how", ["fused", "dense"])
def test_the_weights_of_a_model_multiply_on_their_device(how, monkeypatch):
    """The way that `auto` would time on a GPU is given here."""
    most = triton_matmul.Crossover(256 if how == "fused" else 0, "")
    monkeypatch.setattr(triton_matmul, "_measure", lambda *_: most)
    monkeypatch.setattr(triton_matmul, "measured", {})
    draw = torch.Generator().manual_seed(0)
    x, dy = torch.randn(20, 256, generator=draw).half(), torch.randn(20, 64, generator=draw).half()
    blocks = blocks_of(Type.Q4_K, 64, 256)
    for here in (GGUFBlocks(blocks, Type.Q4_K, 256), nf4_weight((64, 256))):
        dense = here.dequantize(torch.float16).clone().float()
        there = DeviceBlocks(torch.from_numpy(blocks).to(DEVICE), Type.Q4_K, 256)
        there = there if isinstance(here, GGUFBlocks) else here.to(DEVICE)
        for found, expected in [
            (there.times_transposed(x.to(DEVICE)), x.float() @ dense.T),
            (there.times(dy.to(DEVICE)), dy.float() @ dense),
        ]:
            close = {"rtol": 1e-3, "atol": 1e-4 * float(expected.abs().max())}
            torch.testing.assert_close(found.cpu().float(), expected, **close)
    assert {key[0] for key in triton_matmul.measured} == {"_times_transposed", "_times"}


# -- which way


def test_a_fused_product_is_taken_up_to_where_a_dense_one_first_wins():
    way = triton_matmul.crossover(lambda n: n * 1e-6, lambda n: 50e-6 if n < 256 else 1.0)
    assert way == (32, "at 64 tokens 64 µs, 50 µs over a dense copy")
    assert triton_matmul.crossover(lambda n: n * 1e-6, lambda _: 1e-6).tokens == 0
    always = triton_matmul.crossover(lambda _: 1e-6, lambda _: 2e-6)
    assert always == (256, "at 256 tokens 1 µs, 2 µs over a dense copy")


def test_a_shape_is_timed_once_and_never_for_many_tokens(monkeypatch):
    timed = []
    monkeypatch.setattr(triton_matmul, "measured", {})
    monkeypatch.setattr(
        triton_matmul, "_measure", lambda kernel, *_: timed.append(kernel) or triton_matmul.Crossover(16, "")
    )
    forward, backward = triton_matmul._times_transposed, triton_matmul._times
    weight = stored(blocks_of(Type.Q8_0, 8, 64), Type.Q8_0, 64)

    def fused(kernel, n_tokens, how="auto", dtype=torch.bfloat16):
        return triton_matmul._is_fused(kernel, torch.zeros(n_tokens, 64, dtype=dtype, device=DEVICE), weight, how)

    assert [fused(forward, n) for n in (257, 16, 17, 1, 0)] == [False, True, False, True, False]
    assert timed == [forward]
    assert fused(backward, 16)
    assert timed == [forward, backward]
    assert not fused(forward, 1, dtype=torch.float32)
    assert timed == [forward, backward]
    assert [fused(forward, 4096, how) for how in ("fused", "dense")] == [True, False]
    # a row of 77 weights ends within a group
    assert not triton_matmul._is_fused(forward, torch.zeros(1, 77), stored_nf4(nf4_weight((4, 77))), "fused")


@pytest.mark.skipif(not COMPILED, reason="there is no GPU to time")
def test_a_gpu_is_timed(monkeypatch):
    monkeypatch.setattr(triton_matmul, "measured", {})
    weight = stored(blocks_of(Type.Q4_K, 256, 512), Type.Q4_K, 512)
    triton_matmul.times_transposed(torch.ones(4, 512, device=DEVICE, dtype=torch.bfloat16), weight)
    (found,) = triton_matmul.measured.values()
    assert "over a dense copy" in found.why


# -- where


def test_the_table_here_is_the_table_there():
    assert set(triton_blocks.DECODE) == torch_blocks.TRITON


def test_which_devices_have_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index == 1 else (8, 9))
    has = has_triton.__wrapped__
    assert [has(torch.device(d)) for d in ("cpu", "mps", "cuda:0", "cuda:1")] == [False, False, True, False]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not has(torch.device("cuda:0"))
    monkeypatch.undo()
    monkeypatch.setattr(gpu, "find_spec", lambda _: None)
    assert not has(torch.device("cuda:0"))


ON_THE_CPU = """
import sys, torch
from gguf.constants import GGMLQuantizationType as Type
from edgelora.base.nf4 import quantize_nf4
from edgelora.base.torch_blocks import DeviceBlocks
blocks = DeviceBlocks(torch.zeros(4, 288, dtype=torch.uint8), Type.Q4_K, 512)
for weight in (blocks, quantize_nf4(torch.randn(4, 512))):
    weight.dequantize(torch.bfloat16), weight.rows(0, 2), weight.gather(torch.tensor([1]))
    weight.times(torch.ones(2, 4)), weight.times_transposed(torch.ones(2, 512))
sys.exit("triton was imported" if "triton" in sys.modules else 0)
"""


def test_a_cpu_never_imports_triton():
    done = subprocess.run([sys.executable, "-c", ON_THE_CPU], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# -- compiled without a GPU: what the interpreter cannot show

COMPILE = """
import json, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from edgelora.base import triton_blocks, triton_matmul

def compiled(kernel, decode, dtype, constants, warps, capability):
    n_parts = 6 if decode is triton_blocks._nf4 else 1
    parts = ("*u8",) if n_parts == 1 else ("*u8", "*u8", "*fp32", "*fp32", "*fp32", "*fp32")
    constants = {"decode": decode, **constants}
    signature = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr") | {"parts": parts}
    signature |= {name: dtype for name in ("x", "y", "dx", "dy", "out") if name in signature}
    where = kernel.arg_names.index("parts")
    # as for tensors that torch allocates, and widths of real models
    aligned = [(i,) for i, name in enumerate(signature) if signature[name] in (dtype, "i32") and name != "n_tokens"]
    attributes = {at: [["tt.divisibility", 16]] for at in aligned + [(where, i) for i in range(n_parts)]}
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": warps, **triton_blocks.EXACT}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

def local_bytes(binary):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    stack, local = re.search(r"STACK:(\\d+).*?LOCAL:(\\d+)", said.stdout + said.stderr).groups()
    return int(stack) + int(local)

capability, found = int(sys.argv[1]), []
functions = [*triton_blocks.DECODE.values(), triton_blocks._nf4]
for decode in functions:
    for dtype in ("*fp32", "*bf16"):
        size = {"GROUPS": triton_blocks.GROUPS_AT_ONCE}
        b = compiled(triton_blocks._dequantize, decode, dtype, size, 4, capability)
        found.append(["_dequantize", decode.__name__, dtype, b.asm["ptx"], b.metadata.shared, local_bytes(b)])
    for kernel in (triton_matmul._times_transposed, triton_matmul._times):
        for tokens, warps in ((16, 4), (128, 8)):
            size = {"TOKENS": tokens, "ROWS": triton_matmul.ROWS, "GROUPS": triton_matmul.GROUPS}
            b = compiled(kernel, decode, "*bf16", size, warps, capability)
            found.append([kernel.__name__, decode.__name__, "*bf16", b.asm["ptx"], b.metadata.shared, local_bytes(b)])
json.dump(found, sys.stdout)
"""
SHARED_BYTES = 99 << 10  # of a program, on the consumer cards of compute capability 8.6, 8.9 and 12.0


@pytest.mark.parametrize("capability", [80, 90], ids=lambda c: f"sm_{c}")
def test_kernels_compile_for_gpus(capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMPILE, str(capability)], capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == 6 * (len(KINDS) + 1)
    for kernel, decode, dtype, ptx, shared_bytes, local_bytes in found:
        case = (kernel, decode, dtype)
        assert shared_bytes <= SHARED_BYTES, case
        assert local_bytes <= 16, case  # hardly anything spills out of the registers: 4 of a thread's numbers at most
        # each product and each sum rounds: of those without .rn, the assembler too may contract two
        assert not re.search(r"\b(fma|mul\.f|add\.f|sub\.f)", ptx), case
        assert ".ftz" not in ptx, case  # subnormal scales stay what they are
        if dtype == "*bf16":
            assert "cvt.rn.bf16" in ptx, case
        if kernel != "_dequantize":
            assert "mma" in ptx, case  # tensor cores
