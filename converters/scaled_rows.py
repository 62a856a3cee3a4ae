"""Rows of a weight times a number each, without quantizing them again: the scale of every block takes it up.

A block's weights are products of its scale d, a float16, with whole numbers, and in some types a minimum beside it,
another float16. Multiplied by f both are rounded once more and nothing else is: an error of 2⁻¹¹ at most where d is a
normal float16, more where it is subnormal, as Q6_K's often is.
"""

from __future__ import annotations

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from edgelora.base import ggml

Type = GGMLQuantizationType

# Where the float16 numbers of a block stand, in bytes. Types that are not here scale by other numbers (IQ1_M splits its
# own among the scales of its parts; MXFP4 and NVFP4 have 8 bits).
SCALES: dict[Type, tuple[int, ...]] = {
    Type.Q4_0: (0,), Type.Q4_1: (0, 2), Type.Q5_0: (0,), Type.Q5_1: (0, 2), Type.Q8_0: (0,),
    Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,),
    Type.IQ4_NL: (0,), Type.IQ4_XS: (0,), Type.IQ3_S: (0,), Type.IQ3_XXS: (0,), Type.IQ2_S: (0,), Type.IQ2_XS: (0,),
    Type.IQ2_XXS: (0,), Type.IQ1_S: (0,), Type.TQ1_0: (52,), Type.TQ2_0: (64,),
}  # fmt: skip


def can_scale(kind: Type) -> bool:
    """Whether rows of this type can be multiplied in place: floats, and blocks with a float16 scale."""
    return kind in SCALES or kind in ggml.FLOATS


def scale_rows(rows: np.ndarray, kind: Type, factors: np.ndarray) -> np.ndarray:
    """The rows, uint8 (n, bytes per row), times `factors` float32 (n,). Infinite where a product is beyond the type."""
    with np.errstate(over="ignore"):
        if kind in ggml.FLOATS:
            columns = rows.shape[1] // ggml.row_bytes(kind, 1)
            return ggml.quantize(ggml.dequantize(rows, kind, columns) * factors[:, None], kind)
        _, block_bytes = GGML_QUANT_SIZES[kind]
        blocks = rows.copy().reshape(len(rows), -1, block_bytes)
        for at in SCALES[kind]:
            scales = np.ascontiguousarray(blocks[:, :, at : at + 2]).view(np.float16).astype(np.float32)
            scaled = (scales * factors[:, None, None]).astype(np.float16)
            blocks[:, :, at : at + 2] = scaled.view(np.uint8)
    return blocks.reshape(rows.shape)
