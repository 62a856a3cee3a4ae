"""New rows of some tokens → the LoRA that makes them, exactly: one-hot rows, of rank k for k tokens. Imports no torch.

W' = W + H (R − W_ids), H (V, k) with a one where token i has its row. llama.cpp looks rows of the embedding up in
`lora_a`, which there is H, and multiplies them by `lora_b`, (R − W_ids)ᵀ (d, k); of the head they are as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgelora.base import ggml
from edgelora.base.model import Base
from edgelora.errors import ExportError
from edgelora.peft.change import LoraPair

EMBEDDING = "token_embd.weight"
Rows = tuple[np.ndarray, np.ndarray]
"""The ids (k,) of tokens, and their new rows (k, d) float32."""


def token_pairs(base: Base, token_rows: Mapping[str, Rows]) -> dict[str, LoraPair]:
    """By GGUF's names, as a file has them: of the embedding `a` is H and `b` (R − W)ᵀ. `token_rows`: by HF's names.

    Raises ExportError over a base whose embedding is its head too.
    """
    if token_rows:
        require_two_matrices(base)
    pairs = {}
    for module, (ids, rows) in token_rows.items():
        stored, tensor = base.tensors.matrix(f"{module}.weight"), base.tensor_of(module)
        change = rows - ggml.dequantize(np.ascontiguousarray(stored.rows[ids]), stored.kind, stored.columns)
        one_hot = np.zeros((len(stored.rows), len(ids)), np.float32)
        one_hot[ids, np.arange(len(ids))] = 1
        pair = LoraPair(change, one_hot)
        pairs[tensor] = looked_up(pair) if tensor == EMBEDDING else pair
    return pairs


def looked_up(pair: LoraPair) -> LoraPair:
    """A pair of the embedding, b (V, r) and a (r, d), as a file has it."""
    return LoraPair(np.ascontiguousarray(pair.b), np.ascontiguousarray(pair.a.T))


def require_two_matrices(base: Base) -> None:
    """Raise ExportError over a base whose embedding is its head too."""
    if base.config.tie_word_embeddings:
        raise ExportError(
            what=f"{base.path}: its embedding is its head too",
            why="a LoRA of such a matrix stops llama.cpp",
            fix=f"write it with a head of its own, `edgelora untie {base.path} --out FILE`, and export over that; "
            "or merge (--door merged)",
        )
