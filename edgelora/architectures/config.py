"""What describes a model: its dimensions (`ModelConfig`) and its family (`Architecture`). Knows no tensors' values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgelora.files.gguf import GGUFFile


@dataclass(frozen=True)
class ModelConfig:
    """The dimensions of a decoder, under the names of Hugging Face's config.json."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) of every linear layer inside a decoder layer, by its HF name."""
        d, ff = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, q), "mlp.gate_proj": (ff, d), "mlp.up_proj": (ff, d), "mlp.down_proj": (d, ff),
        }  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A family: how its GGUF metadata maps to `ModelConfig`, and which rows GGUF keeps in another order.

    `rotary_heads(config)` names the linears whose rows GGUF permutes, with their number of heads.
    """

    model_type: str
    gguf_name: str
    read_config: Callable[[GGUFFile], ModelConfig]
    rotary_heads: Callable[[ModelConfig], dict[str, int]]


def rows_to_gguf(n_rows: int, n_heads: int) -> np.ndarray:
    """The order in which GGUF stores the rows of a rotary projection: `gguf = hf[rows_to_gguf(...)]`.

    HF rotates the halves (i, i + d/2) of a head, llama.cpp's "normal" rope adjacent pairs (2i, 2i + 1).
    """
    half = n_rows // n_heads // 2
    return np.arange(n_rows).reshape(n_heads, 2, half).swapaxes(1, 2).reshape(-1)


def rows_to_hf(n_rows: int, n_heads: int) -> np.ndarray:
    """The inverse: `hf = gguf[rows_to_hf(...)]`."""
    return np.argsort(rows_to_gguf(n_rows, n_heads))
