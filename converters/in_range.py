"""Floats become rows of a type, and none of them infinite on the way: F16, and the scales of blocks, end at 65504."""

from __future__ import annotations

import numpy as np
from gguf.constants import GGMLQuantizationType as Type

from edgelora.base import ggml
from edgelora.errors import ExportError

SAFE_IN_ANY_TYPE = 32768.0  # no weight up to here gives a block a scale that F16 does not hold


def in_range(
    name: str, weights: np.ndarray, kind: Type, importance: np.ndarray | None = None, *, fix: str
) -> np.ndarray:
    """float32 (n, columns) as rows of `kind`, uint8 (n, bytes per row).

    name: "TENSOR: a weight", for the ExportError that is raised, with `fix`, if one of them does not fit.
    """
    largest = max(float(weights.max()), -float(weights.min()))
    if largest <= SAFE_IN_ANY_TYPE:
        return ggml.quantize(weights, kind, importance)
    rows = None
    if np.isfinite(largest):  # some of ggml's kernels abort on what is no number
        with np.errstate(over="ignore"):
            rows = ggml.quantize(weights, kind, importance)
    if rows is not None and np.isfinite(ggml.dequantize(rows, kind, weights.shape[1])).all():
        return rows
    raise ExportError(
        what=f"{name} {'is not a number' if rows is None else f'does not fit into {kind.name}'}",
        why=f"F16, and the scales of blocks, end at 65504; the largest weight is {largest:.3g}",
        fix=fix,
    )
