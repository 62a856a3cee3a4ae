"""ggml's kernels in-process against gguf-py's, bit for bit, for every type of the table."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type

from edgelora import team
from edgelora.base import ggml
from edgelora.errors import BaseModelError, EdgeloraError, ExportError
from edgelora.kernels import load

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


OWN = [kind for kind, name in ggml.DEQUANTIZE.items() if name in load.BLOCKS]


@pytest.mark.skipif(load.library() is None, reason="no compiler was here at installation")
@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", OWN, **BY_NAME)
def test_our_own_kernels_write_the_bits_of_ggml(kind, narrow, monkeypatch):
    blocks = random_blocks(kind)
    ours = np.empty((len(blocks), COLUMNS), np.uint16 if narrow else np.float32)
    theirs = np.empty_like(ours)
    ggml.Reader(blocks, kind, COLUMNS).read(0, len(blocks), ours.ctypes.data, bfloat16=narrow)
    monkeypatch.setattr(ggml, "_own", lambda _: None)
    ggml.Reader(blocks, kind, COLUMNS).read(0, len(blocks), theirs.ctypes.data, bfloat16=narrow)
    if narrow:
        np.testing.assert_array_equal(ours, theirs)
    else:
        np.testing.assert_array_equal(bits(ours), bits(theirs))


def test_every_quantized_type_that_a_file_can_hold_is_read():
    quantized = {kind for kind, (weights_per_block, _) in gguf.GGML_QUANT_SIZES.items() if weights_per_block > 1}
    assert set(ggml.DEQUANTIZE) == quantized - {Type.Q8_1, Type.Q8_K}


def test_one_bit_blocks_are_signs_of_their_scale():
    blocks = random_blocks(Type.Q1_0)  # gguf-py has no code for it: 2 bytes of scale, then 128 bits
    scale = blocks.reshape(-1, 18)[:, :2].copy().view(np.float16).astype(np.float32)
    signs = np.unpackbits(blocks.reshape(-1, 18)[:, 2:], axis=1, bitorder="little")
    expected = np.where(signs, scale, -scale).reshape(64, COLUMNS)
    np.testing.assert_array_equal(bits(ggml.dequantize(blocks, Type.Q1_0, COLUMNS)), bits(expected))


@pytest.mark.parametrize("kind", [*ggml.DEQUANTIZE, *FLOATS], **BY_NAME)
def test_quantize_is_that_of_gguf_py(kind):
    try:
        expected = gguf.quants.quantize(weights(), kind)
    except NotImplementedError:
        pytest.skip(f"gguf-py cannot quantize {kind.name}")
    np.testing.assert_array_equal(ggml.quantize(weights(), kind), expected.view(np.uint8))


@pytest.mark.parametrize("source", [*FLOATS, Type.Q8_0], **BY_NAME)
@pytest.mark.parametrize("to", [Type.Q4_0, Type.Q4_K, Type.BF16], **BY_NAME)
def test_requantize_is_all_rows_at_once(source, to, monkeypatch):
    rows = ggml.quantize(weights(rows=9), source)
    expected = rows if source == to else ggml.quantize(ggml.dequantize(rows, source, COLUMNS), to)
    monkeypatch.setattr(ggml, "ELEMENTS_AT_ONCE", 2 * COLUMNS)  # five parts
    np.testing.assert_array_equal(ggml.requantize(rows, source, COLUMNS, to), expected)


def test_requantize_keeps_few_floats(monkeypatch):
    alive = []
    dequantize = ggml.dequantize
    monkeypatch.setattr(ggml, "dequantize", lambda rows, *a: alive.append(len(rows)) or dequantize(rows, *a))
    monkeypatch.setattr(ggml, "ELEMENTS_AT_ONCE", 2 * COLUMNS)
    ggml.requantize(ggml.quantize(weights(rows=9), Type.F16), Type.F16, COLUMNS, Type.Q8_0)
    assert alive == [2, 2, 2, 2, 1]


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


@pytest.fixture(params=["pool", "openmp"])
def many_threads(request, monkeypatch):
    """Four threads whatever the machine has, from the first float on: a pool's, or torch's own."""
    with ThreadPoolExecutor(4) as pool:
        monkeypatch.setattr(team, "threads", lambda: 4)
        monkeypatch.setattr(team, "_pool", lambda: pool)
        for limit in ("ELEMENTS_PER_THREAD", "QUANTIZED_PER_THREAD"):
            monkeypatch.setattr(ggml, limit, 1)
        if request.param == "pool":
            monkeypatch.setattr(team, "shared_openmp", lambda: None)
        elif team.shared_openmp() is None:
            pytest.skip("this torch brings no libgomp")
        yield


@pytest.fixture(scope="module")
def alone():
    """What one thread gives for the random blocks of each type."""
    return {kind: ggml.dequantize(random_blocks(kind), kind, COLUMNS) for kind in ggml.DEQUANTIZE}


@pytest.mark.parametrize("kind", ggml.DEQUANTIZE, **BY_NAME)
def test_threads_do_not_change_the_floats(alone, kind, many_threads):  # noqa: ARG001
    blocks = random_blocks(kind)
    assert team.split(6, 6 * COLUMNS, 1) == [(0, 1), (1, 3), (3, 4), (4, 6)]
    np.testing.assert_array_equal(bits(ggml.dequantize(blocks, kind, COLUMNS)), bits(alone[kind]))


@pytest.fixture(scope="module")
def quantized_alone():
    """What one thread quantizes the weights to, with and without importance."""
    hints = (None, importance())
    return {(kind, hint is None): ggml.quantize(weights(), kind, hint) for kind in FAST for hint in hints}


@pytest.mark.parametrize("hint", [None, importance()], ids=["plain", "importance"])
@pytest.mark.parametrize("kind", FAST, **BY_NAME)
def test_threads_do_not_change_the_blocks(quantized_alone, kind, hint, many_threads):  # noqa: ARG001
    np.testing.assert_array_equal(ggml.quantize(weights(), kind, hint), quantized_alone[kind, hint is None])


def test_no_thread_gets_less_than_is_worth_waking_it_for():
    assert team.split(6, 6 * COLUMNS, 6 * COLUMNS) == [(0, 6)]
    assert team.split(0, 0, 1) == [(0, 0)]


def test_every_piece_is_done_once_and_a_fault_comes_back(many_threads):  # noqa: ARG001
    done = []
    team.run([(i, i + 1) for i in range(7)], lambda first, _: done.append(first))
    assert sorted(done) == list(range(7))

    def fails(first: int, _: int) -> None:
        if first == 2:
            raise RuntimeError("piece 2")

    with pytest.raises(RuntimeError, match="piece 2"):
        team.run([(i, i + 1) for i in range(4)], fails)


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


@pytest.mark.parametrize(
    ("kind", "why"),
    [(Type.Q8_1, "activations"), (Type.Q8_K, "activations"), (Type.I32, "no code"), (Type.F64, "no code")],
)
def test_a_type_without_kernel_is_refused(kind, why):
    with pytest.raises(BaseModelError) as e:
        ggml.dequantize(np.zeros((1, ggml.row_bytes(kind, 256)), np.uint8), kind, 256)
    assert e.value.what == f"tensors of type {kind.name} cannot be read"
    assert why in e.value.why
    assert "Q4_0" in e.value.fix


def test_a_missing_library_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BaseModelError) as e:
        ggml.library_path()
    assert e.value.what == "libggml-base was not found"
    assert "not installed" in e.value.why
    assert "pip install llama-cpp-python" in e.value.fix


# -- without the library --------------------------------------------------------------------------------------------


def not_installed(monkeypatch, _):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)


def broken(monkeypatch, tmp_path):
    (tmp_path / "libggml-base.so").write_text("not a library")
    monkeypatch.setattr(ggml, "library_path", lambda: tmp_path / "libggml-base.so")


def older(monkeypatch, _):
    monkeypatch.setattr(ggml, "DEQUANTIZE", dict.fromkeys(ggml.DEQUANTIZE, "of_tomorrow"))


@pytest.fixture(params=[not_installed, broken, older], ids=lambda way: way.__name__)
def lose_library(request, monkeypatch, tmp_path):
    """`lose_library()`: from here on ggml's functions cannot be opened."""
    cached = (ggml._library, ggml._dequantizer, ggml._say_what_gguf_py_costs)

    def lose():
        request.param(monkeypatch, tmp_path)
        for function in cached:
            function.cache_clear()

    yield lose
    for function in cached:
        function.cache_clear()


@pytest.mark.filterwarnings("ignore:invalid value|overflow:RuntimeWarning")  # gguf-py, at scales that are infinite
@pytest.mark.parametrize("kind", [kind for kind in ggml.DEQUANTIZE if kind != Type.Q1_0], **BY_NAME)
@pytest.mark.usefixtures("many_threads")
def test_without_the_library_the_floats_are_the_same(kind, lose_library):
    expected = ggml.dequantize(random_blocks(kind), kind, COLUMNS)
    lose_library()
    np.testing.assert_array_equal(bits(ggml.dequantize(random_blocks(kind), kind, COLUMNS)), bits(expected))
    assert ggml._dequantizer(kind) is None


def test_without_the_library_one_line_says_what_it_costs(lose_library, caplog):
    lose_library()
    for kind in (Type.Q4_0, Type.Q4_K, Type.Q4_0):
        ggml.dequantize(np.zeros((1, ggml.row_bytes(kind, 256)), np.uint8), kind, 256)
    (line,) = caplog.messages
    assert "4 to 40 times slower" in line
    assert "pip install llama-cpp-python" in line


def test_a_library_that_does_not_load_quantizes_nothing(monkeypatch, tmp_path):
    broken(monkeypatch, tmp_path)
    monkeypatch.setattr(ggml, "_library", ggml._library.__wrapped__)
    with pytest.raises(BaseModelError) as e:
        ggml.quantize(weights(), Type.Q4_0)
    assert e.value.what == f"{tmp_path / 'libggml-base.so'} could not be loaded"
    assert e.value.why
    assert "pip install llama-cpp-python" in e.value.fix


def test_what_gguf_py_cannot_read_either_is_refused(lose_library):
    lose_library()
    with pytest.raises(BaseModelError) as e:
        ggml.dequantize(random_blocks(Type.Q1_0), Type.Q1_0, COLUMNS)
    assert e.value.what == "tensors of type Q1_0 cannot be read without libggml-base"
    assert "gguf-py has no code for this type" in e.value.why
    assert "pip install llama-cpp-python" in e.value.fix


# -- what never reaches C -------------------------------------------------------------------------------------------


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


class Rang(Exception):
    pass


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer signals here")
def test_what_a_signal_raises_comes_out_and_nothing_is_left_undone():
    """Python runs handlers where a callback begins, too: ctypes would print what they raise, and go on."""
    pytest.importorskip("torch")
    if team.shared_openmp() is None:
        pytest.skip("torch brings no libgomp here")
    rung = caught = running = 0

    def ring(*_: object) -> None:
        nonlocal rung
        rung += 1
        raise Rang

    def work(first: int, _last: int) -> None:
        nonlocal running
        running += 1
        done.append(first)
        running -= 1

    before = signal.signal(signal.SIGALRM, ring)
    gc.collect()
    gc.disable()  # what is raised inside another object's finalizer is Python's to lose
    try:
        until = time.monotonic() + 60  # for one that is lost
        while caught < 200 and time.monotonic() < until:
            try:
                signal.setitimer(signal.ITIMER_REAL, 5e-4 + 1e-5 * (caught % 50))  # once: two could meet in one team
                while time.monotonic() < until:
                    done: list[int] = []
                    team.run([(0, 1), (1, 2)], work)
                    assert len(done) == 2
            except Rang:
                signal.setitimer(signal.ITIMER_REAL, 0)
                caught += 1
                assert running == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        gc.enable()
    assert caught == rung == 200
