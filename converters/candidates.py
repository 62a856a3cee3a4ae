"""Which types a tensor may get when a size is to be hit: all that its rows divide into and llama.cpp runs well."""

from __future__ import annotations

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from converters.quant_types import requires_importance

Type = GGMLQuantizationType

# From large to small. TQ1_0, TQ2_0, Q1_0 and the FP4 types are for weights trained for them; of the IQ1 types,
# far from the original, a KL that is scaled from the probe's says nothing, and their tables take 7 s to make.
CANDIDATES = (
    Type.F16, Type.Q8_0, Type.Q6_K, Type.Q5_1, Type.Q5_K, Type.Q5_0, Type.Q4_1, Type.Q4_K, Type.Q4_0, Type.IQ4_NL,
    Type.IQ4_XS, Type.Q3_K, Type.IQ3_S, Type.IQ3_XXS, Type.Q2_K, Type.IQ2_S, Type.IQ2_XS, Type.IQ2_XXS,
)  # fmt: skip
# The type whose KL is measured: low enough to stand out, high enough to be near the original. The first that fits.
PROBES = (Type.Q3_K, Type.Q4_0, Type.F16)


def candidates(name: str, columns: int, important: bool) -> tuple[Type, ...]:
    """The types for rows of `columns` weights. important: whether there is importance for the tensor."""
    return tuple(
        kind for kind in CANDIDATES
        if columns % GGML_QUANT_SIZES[kind][0] == 0 and (important or not requires_importance(name, kind))
    )  # fmt: skip


def probe(columns: int) -> Type:
    """The type that a tensor with rows of so many weights is measured as."""
    return next(kind for kind in PROBES if columns % GGML_QUANT_SIZES[kind][0] == 0)
