"""What a model can be quantized to: llama.cpp's file types by llama-quantize's names, and the types of single tensors.

A file type is a recipe (Q4_K_M gives most tensors Q4_K, some Q6_K); `converters/plan.py` asks llama.cpp what it makes
of a model. Q2_0, which llama-quantize also lists, is left out: gguf-py, and so every reader here, has no such type.
"""

from __future__ import annotations

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from edgelora.errors import ConfigError

Type = GGMLQuantizationType

COPY = "COPY"

# llama-quantize's names. COPY keeps every tensor as it is; the names without a letter mean the middle recipe.
QUANT_TYPES: dict[str, LlamaFileType] = {
    "Q1_0": LlamaFileType.MOSTLY_Q1_0,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": LlamaFileType.MOSTLY_Q4_1,
    "MXFP4_MOE": LlamaFileType.MOSTLY_MXFP4_MOE,
    "Q5_0": LlamaFileType.MOSTLY_Q5_0,
    "Q5_1": LlamaFileType.MOSTLY_Q5_1,
    "IQ2_XXS": LlamaFileType.MOSTLY_IQ2_XXS,
    "IQ2_XS": LlamaFileType.MOSTLY_IQ2_XS,
    "IQ2_S": LlamaFileType.MOSTLY_IQ2_S,
    "IQ2_M": LlamaFileType.MOSTLY_IQ2_M,
    "IQ1_S": LlamaFileType.MOSTLY_IQ1_S,
    "IQ1_M": LlamaFileType.MOSTLY_IQ1_M,
    "TQ1_0": LlamaFileType.MOSTLY_TQ1_0,
    "TQ2_0": LlamaFileType.MOSTLY_TQ2_0,
    "Q2_K": LlamaFileType.MOSTLY_Q2_K,
    "Q2_K_S": LlamaFileType.MOSTLY_Q2_K_S,
    "IQ3_XXS": LlamaFileType.MOSTLY_IQ3_XXS,
    "IQ3_S": LlamaFileType.MOSTLY_IQ3_S,
    "IQ3_M": LlamaFileType.MOSTLY_IQ3_M,
    "Q3_K": LlamaFileType.MOSTLY_Q3_K_M,
    "IQ3_XS": LlamaFileType.MOSTLY_IQ3_XS,
    "Q3_K_S": LlamaFileType.MOSTLY_Q3_K_S,
    "Q3_K_M": LlamaFileType.MOSTLY_Q3_K_M,
    "Q3_K_L": LlamaFileType.MOSTLY_Q3_K_L,
    "IQ4_NL": LlamaFileType.MOSTLY_IQ4_NL,
    "IQ4_XS": LlamaFileType.MOSTLY_IQ4_XS,
    "Q4_K": LlamaFileType.MOSTLY_Q4_K_M,
    "Q4_K_S": LlamaFileType.MOSTLY_Q4_K_S,
    "Q4_K_M": LlamaFileType.MOSTLY_Q4_K_M,
    "Q5_K": LlamaFileType.MOSTLY_Q5_K_M,
    "Q5_K_S": LlamaFileType.MOSTLY_Q5_K_S,
    "Q5_K_M": LlamaFileType.MOSTLY_Q5_K_M,
    "Q6_K": LlamaFileType.MOSTLY_Q6_K,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "F32": LlamaFileType.ALL_F32,
    COPY: LlamaFileType.ALL_F32,
}

# Their recipes take per-tensor types (--tensor-type) or a mixture to be --pure of; these do not.
WITHOUT_RECIPE = ("F16", "BF16", "F32", COPY)

# Recipes that hold types of IMPORTANCE_TYPES where rows are multiples of 256; Q2_K_S wants importance for its Q2_K.
NEEDS_IMPORTANCE = frozenset(
    ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S")
)  # fmt: skip

# What llama-quantize refuses for a layer's tensor without importance, and what ggml's kernel aborts on for any tensor.
IMPORTANCE_TYPES = frozenset((Type.IQ3_XXS, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ1_M, Type.IQ1_S))
ABORTS_WITHOUT = frozenset((Type.IQ2_XXS, Type.IQ2_XS, Type.IQ1_S))

# What a tensor of a file can be quantized to: `ggml_quantize_chunk` has no other.
TENSOR_TYPES = tuple(
    GGMLQuantizationType[name]
    for name in (
        "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "Q3_K", "Q2_K",
        "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "TQ2_0", "TQ1_0",
        "MXFP4", "NVFP4", "Q1_0",
    )
)  # fmt: skip

EMBEDDINGS, HEAD = ("token_embd.weight", "per_layer_token_embd.weight"), "output.weight"


def parse_type(name: str) -> LlamaFileType:
    """`q4_k_m` → llama.cpp's number for it. Raises ConfigError with the names there are."""
    kind = QUANT_TYPES.get(name.upper())
    if kind is None:
        raise ConfigError(
            what=f"{name}: no such quantization type",
            why="llama.cpp quantizes to types of other names",
            fix=f"choose one of {', '.join(QUANT_TYPES)}",
        )
    return kind


def parse_tensor_type(name: str) -> Type:
    """`q6_k` → ggml's type of one tensor. Raises ConfigError with the names there are."""
    kind = next((kind for kind in TENSOR_TYPES if kind.name == name.upper()), None)
    if kind is None:
        is_recipe = name.upper() in QUANT_TYPES
        raise ConfigError(
            what=f"{name}: no such type of a tensor",
            why="it is a recipe for a whole file" if is_recipe else "ggml quantizes to types of other names",
            fix=f"choose one of {', '.join(kind.name for kind in TENSOR_TYPES)}",
        )
    return kind


def requires_importance(tensor: str, kind: Type, file_type: LlamaFileType | None = None) -> bool:
    """Whether `tensor` cannot become `kind` without importance: llama-quantize's rule, and that of ggml's kernels.

    file_type: the recipe, or None for a plan of one's own; Q2_K needs importance in Q2_K_S alone.
    """
    if kind in ABORTS_WITHOUT:
        return True
    if tensor in EMBEDDINGS or tensor == HEAD:  # llama-imatrix counts neither unless it is told to
        return False
    return kind in IMPORTANCE_TYPES or (kind == Type.Q2_K and file_type == LlamaFileType.MOSTLY_Q2_K_S)


def tensor_bytes(shape: tuple[int, ...], kind: Type) -> int:
    """What a tensor of `shape` (numpy's order) takes as `kind`, without padding."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape, dtype=np.int64)) // block * block_bytes
