"""ggml's kernels in-process against gguf-py's, bit for bit, for every type of the table."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type

from edgelora.base import ggml
from edgelora.errors import BaseModelError, EdgeloraError, ExportError

COLUMNS = 512  # two blocks of a K-quant
FLOATS = (Type.F32, Type.F16, Type.BF16)
NEEDS_IMPORTANCE = (Type.IQ1_S, Type.IQ2_XXS, Type.IQ2_XS)  # ggml_quantize_requires_imatrix, ggml.c
SLOW = (*NEEDS_IMPORTANCE, Type.IQ1_M, Type.IQ2_S)  # ggml takes seconds to build the tables of their quantizers
FAST = [kind for kind in ggml.DEQUANTIZE if kind not in SLOW]
BY_NAME = {"ids": lambda kind: kind.name}


def weights(rows=6, columns=COLUMNS):
    """Rows of normal floats whose sizes differ by a factor of a thousand."""
    draw = np.random.default_rng(0)
    return (draw.normal(0, 1, (rows, columns)) * np.logspace(-2, 1, rows)[:, None]).astype(np.float32)


def importance(columns=COLUMNS):
    return np.random.default_rng(1).uniform(0.1, 2, columns).astype(np.float32)


def random_blocks(kind):
    """Any bytes are blocks: every code occurs, and scales that are subnormal, huge, infinite and NaN."""
    return np.random.default_rng(2).integers(0, 256, (64, ggml.row_bytes(kind, COLUMNS)), np.uint8)


def bits(floats):
    """The floats as integers, so that equal is equal to the last bit; all NaNs are one."""
    return np.where(np.isnan(floats), np.float32(np.nan), floats).astype(np.float32).view(np.uint32)


@pytest.mark.filterwarnings("ignore:invalid value|overflow:RuntimeWarning")  # gguf-py, at scales that are infinite
@pytest.mark.parametrize("make", [random_blocks, lambda kind: ggml.quantize(weights(), kind)], ids=["random", "real"])
@pytest.mark.parametrize("kind", ggml.DEQUANTIZE, **BY_NAME)
def test_dequantize_is_that_of_gguf_py(kind, make):
    if make is not random_blocks and kind in SLOW:
        pytest.skip(f"ggml takes seconds to make ready to quantize {kind.name}; its random blocks are tested")
    blocks = make(kind)
    try:
        expected = gguf.quants.dequantize(blocks, kind)
    except NotImplementedError:
        pytest.skip(f"gguf-py cannot dequantize {kind.name}")
    np.testing.assert_array_equal(bits(ggml.dequantize(blocks, kind, COLUMNS)), bits(expected))


@pytest.mark.parametrize("kind", [*ggml.DEQUANTIZE, *FLOATS], **BY_NAME)
def test_quantize_is_that_of_gguf_py(kind):
    try:
        expected = gguf.quants.quantize(weights(), kind)
    except NotImplementedError:
        pytest.skip(f"gguf-py cannot quantize {kind.name}")
    np.testing.assert_array_equal(ggml.quantize(weights(), kind), expected.view(np.uint8))


# The root of the mean squared error over that of the weights: half a step of the grid, generously.
@pytest.mark.parametrize(
    ("kind", "error"), [(Type.Q8_0, 0.01), (Type.Q6_K, 0.03), (Type.Q5_K, 0.05), (Type.Q4_K, 0.1), (Type.Q3_K, 0.2)]
)
def test_k_quants_come_close_to_the_weights(kind, error):
    given, found = weights(), ggml.dequantize(ggml.quantize(weights(), kind), kind, COLUMNS)
    assert np.linalg.norm(found - given, axis=1).max() > 0
    assert (np.linalg.norm(found - given, axis=1) <= error * np.linalg.norm(given, axis=1)).all()


@pytest.mark.parametrize("kind", [Type.Q2_K, Type.Q4_K, Type.Q4_0], **BY_NAME)
def test_importance_moves_the_error_to_columns_that_matter_less(kind):
    matters = np.where(np.arange(COLUMNS) % 2, 100.0, 0.01).astype(np.float32)
    errors = []
    for hint in (np.ones(COLUMNS, np.float32), matters):
        found = ggml.dequantize(ggml.quantize(weights(), kind, hint), kind, COLUMNS)
        errors.append(np.abs(found - weights())[:, 1::2].mean(1))
    assert (errors[1] < errors[0]).all()


@pytest.mark.parametrize("kind", FLOATS, **BY_NAME)
def test_floats_pass_through(kind):
    exact = np.array([[0.0, -0.0, 1.0, -2.5, 2.0**-14, 256.0]], np.float32)  # all of them in every float type
    blocks = ggml.quantize(exact, kind)
    assert (blocks.dtype, blocks.shape) == (np.uint8, (1, ggml.row_bytes(kind, 6)))
    np.testing.assert_array_equal(bits(ggml.dequantize(blocks, kind, 6)), bits(exact))


@pytest.fixture
def many_threads(monkeypatch):
    """Four threads whatever the machine has, from the first float on."""
    with ThreadPoolExecutor(4) as pool:
        monkeypatch.setattr(ggml, "_pool", lambda: pool)
        monkeypatch.setattr(ggml, "ELEMENTS_PER_THREAD", 1)
        yield


@pytest.mark.parametrize("kind", ggml.DEQUANTIZE, **BY_NAME)
def test_threads_do_not_change_the_floats(kind, request):
    blocks = random_blocks(kind)
    alone = ggml.dequantize(blocks, kind, COLUMNS)
    request.getfixturevalue("many_threads")
    assert ggml._split(6, COLUMNS) == [(0, 1), (1, 3), (3, 4), (4, 6)]
    np.testing.assert_array_equal(bits(ggml.dequantize(blocks, kind, COLUMNS)), bits(alone))


@pytest.mark.parametrize("hint", [None, importance()], ids=["plain", "importance"])
@pytest.mark.parametrize("kind", FAST, **BY_NAME)
def test_threads_do_not_change_the_blocks(kind, hint, request):
    alone = ggml.quantize(weights(), kind, hint)
    request.getfixturevalue("many_threads")
    np.testing.assert_array_equal(ggml.quantize(weights(), kind, hint), alone)


def test_no_thread_gets_less_than_is_worth_waking_it_for():
    assert ggml._split(6, COLUMNS) == [(0, 6)]  # 6 * 512 floats < ELEMENTS_PER_THREAD
    assert ggml._split(0, COLUMNS) == [(0, 0)]


def test_no_rows_are_no_rows():
    assert ggml.dequantize(np.empty((0, 288), np.uint8), Type.Q4_K, COLUMNS).shape == (0, COLUMNS)  # 2 * 144 bytes


# -- faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ggml.DEQUANTIZE, **BY_NAME)
def test_rows_that_do_not_divide_are_refused(kind):
    with pytest.raises(ExportError) as e:
        ggml.quantize(np.ones((2, 40), np.float32), kind)
    assert e.value.what == f"rows of 40 weights cannot become {kind.name}"
    assert f"blocks of {gguf.GGML_QUANT_SIZES[kind][0]} weights" in e.value.why
    assert "smaller blocks" in e.value.fix


def test_a_type_without_kernel_is_refused():
    with pytest.raises(BaseModelError) as e:
        ggml.dequantize(np.zeros((1, ggml.row_bytes(Type.Q8_1, 32)), np.uint8), Type.Q8_1, 32)
    assert e.value.what == "tensors of type Q8_1 cannot be read"
    assert e.value.why
    assert "Q4_0" in e.value.fix


def test_a_missing_library_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BaseModelError) as e:
        ggml.library_path()
    assert e.value.what == "libggml-base was not found"
    assert "not installed" in e.value.why
    assert "pip install llama-cpp-python" in e.value.fix


@pytest.mark.parametrize("shape", [(2, 33), (2, 35)])
def test_blocks_of_another_width_never_reach_c(shape):
    with pytest.raises(ValueError, match="not contiguous rows of 32 Q8_0 weights"):
        ggml.dequantize(np.zeros(shape, np.uint8), Type.Q8_0, 32)


def test_blocks_with_gaps_never_reach_c():
    with pytest.raises(ValueError, match="not contiguous"):
        ggml.dequantize(np.zeros((4, 34), np.uint8)[::2], Type.Q8_0, 32)


def quantize_in_a_child(kind):
    """`quantize` without importance, where an abort inside C ends another process than this one."""
    code = (
        "import numpy as np; from edgelora.base import ggml; from edgelora.errors import EdgeloraError\n"
        f"try: ggml.quantize(np.ones((1, 256), np.float32), ggml.Type({int(kind)}))\n"
        "except EdgeloraError as e: print(type(e).__name__)"
    )
    quiet = os.environ | {"GGML_NO_BACKTRACE": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=quiet)


@pytest.mark.parametrize("kind", NEEDS_IMPORTANCE, **BY_NAME)
def test_a_type_that_needs_importance_is_refused_without(kind):
    done = quantize_in_a_child(kind)
    assert (done.returncode, done.stdout) == (0, "ExportError\n"), done.stderr[-300:]


@pytest.mark.parametrize("kind", [Type.Q8_1, Type.Q8_K, Type.I32], **BY_NAME)
def test_a_type_without_quantizer_is_refused(kind):
    done = quantize_in_a_child(kind)
    assert (done.returncode, done.stdout) == (0, "ExportError\n"), done.stderr[-300:]


def test_importance_of_another_width_never_reaches_c():
    with pytest.raises((ValueError, EdgeloraError)):
        ggml.quantize(weights(), Type.Q4_K, importance(COLUMNS // 2))
