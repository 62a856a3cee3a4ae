"""What quantization took away, as a small LoRA: the residual W − Q(W) truncated where activations are large.

For a column weighting s = sqrt(importance) the rank-r matrix R nearest to W − Q(W) in ‖(W − Q(W) − R) diag(s)‖ is the
truncated SVD of the scaled residual, unscaled (Eckart and Young; the weighting is that of SVD-LLM, arXiv:2403.07378).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgelora.errors import ConfigError
from edgelora.peft.adapter import LoraPair


def require_rank(rank: int, shape: Sequence[int]) -> None:
    """Raise ConfigError for a rank that no matrix of this shape (d_out, d_in) has."""
    if not 0 < rank <= min(shape):
        raise ConfigError(
            what=f"--repair {rank}: no rank for weights of {shape[0]} × {shape[1]}",
            why="a matrix has at least rank 1, and at most as many as its shorter side",
            fix="choose a small one, such as 8",
        )


def repair(residual: np.ndarray, rank: int, importance: np.ndarray | None = None) -> LoraPair:
    """The best pair of `rank` for a residual, float32 (d_out, d_in).

    importance: float32 (d_in,), the mean squared activation of each column; None weighs all alike. A column that no
    activation ever reaches is left alone. Singular values are shared evenly by both factors, which F16 holds best.
    Raises ConfigError for a rank that is none of this matrix.
    """
    require_rank(rank, residual.shape)
    scale = np.ones(residual.shape[1]) if importance is None else np.sqrt(importance.astype(np.float64))
    unscale = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    scaled = residual * scale  # float64 (d_out, d_in)
    wide = scaled.shape[0] < scaled.shape[1]
    gram = scaled @ scaled.T if wide else scaled.T @ scaled  # of the shorter side
    squares, vectors = np.linalg.eigh(gram)  # ascending
    basis, lengths = vectors[:, -rank:], np.sqrt(np.maximum(squares[-rank:], 0))
    root = np.sqrt(lengths)
    spread = np.divide(1.0, root, out=np.zeros_like(root), where=root > 0)
    if wide:  # basis = U
        a, b = (basis.T @ scaled) * spread[:, None], basis * root
    else:  # basis = V
        a, b = basis.T * root[:, None], (scaled @ basis) * spread
    return LoraPair((a * unscale).astype(np.float32), b.astype(np.float32))


def half(pair: LoraPair) -> LoraPair:
    """The pair as a file of F16 holds it, which is what is measured. Infinite where it does not fit."""
    with np.errstate(over="ignore"):
        a, b = (values.astype(np.float16).astype(np.float32) for values in (pair.a, pair.b))
    return LoraPair(a, b)
