"""Repair: the residual of quantization as a LoRA, against numpy's own SVD and what llama.cpp would load."""

from __future__ import annotations

import numpy as np
import pytest

from converters.repair import half, repair
from edgelora.base import ggml
from edgelora.errors import ConfigError


def drawn(shape: tuple[int, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A residual of a real quantization, and importances over four decades."""
    draw = np.random.default_rng(seed)
    weight = draw.normal(0, 0.05, shape).astype(np.float32)
    kind = ggml.Type.Q2_K
    residual = weight - ggml.dequantize(ggml.quantize(weight, kind), kind, shape[1])
    return residual, (10 ** draw.uniform(-3, 1, shape[1])).astype(np.float32)


def weighted(matrix: np.ndarray, importance: np.ndarray) -> float:
    return float((np.square(matrix.astype(np.float64)) @ importance).sum())


@pytest.mark.parametrize("shape", [(64, 256), (300, 256), (256, 256)])
@pytest.mark.parametrize("rank", [1, 8])
def test_no_pair_of_its_rank_leaves_less_weighted_error(shape, rank):
    """The oracle is numpy's full SVD of the scaled residual: the squares of the values that are cut off are left."""
    residual, importance = drawn(shape)
    pair = repair(residual, rank, importance)
    assert (pair.a.shape, pair.b.shape) == ((rank, shape[1]), (shape[0], rank))
    singular = np.linalg.svd(residual * np.sqrt(importance.astype(np.float64)), compute_uv=False)
    left = weighted(residual - pair.b @ pair.a, importance)
    assert left == pytest.approx(float(np.square(singular[rank:]).sum()), rel=1e-4)
    plain = repair(residual, rank)
    assert left < weighted(residual - plain.b @ plain.a, importance)


def test_a_residual_of_low_rank_is_repaired_whole():
    draw = np.random.default_rng(1)
    residual = (draw.normal(size=(96, 3)) @ draw.normal(size=(3, 64))).astype(np.float32)
    pair = half(repair(residual, 8))
    # F16 keeps 11 bits of each factor
    np.testing.assert_allclose(pair.b @ pair.a, residual, atol=4e-3 * np.abs(residual).max())


def test_columns_that_nothing_reaches_are_left_alone():
    residual, importance = drawn((64, 256))
    importance[128:] = 0
    pair = repair(residual, 4, importance)
    assert np.isfinite(pair.a).all()
    assert not pair.a[:, 128:].any()
    assert pair.a[:, :128].any()


def test_what_lost_nothing_needs_no_repair():
    pair = repair(np.zeros((64, 32), np.float32), 2)
    assert not (pair.b @ pair.a).any()


@pytest.mark.parametrize("rank", [0, 65])
def test_a_rank_that_no_matrix_has_is_refused(rank):
    with pytest.raises(ConfigError, match=f"--repair {rank}") as refused:
        repair(np.zeros((64, 256), np.float32), rank)
    assert "64 × 256" in refused.value.what
