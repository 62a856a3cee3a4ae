"""The shapes of models that `benchmarks/gpu.py` builds from random weights, and the row of tokens that all sides see."""

from __future__ import annotations

import torch
from torch import Tensor

# by the names of config.json; `tiny` is for trying the benchmark itself out, also without a GPU
SHAPES = {
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    },
}  # fmt: skip
THETA = 500_000.0
DEVIATION = 0.02  # of the random weights
RANK, ALPHA, LEARNING_RATE, MAX_GRAD_NORM = 16, 32.0, 1e-4, 1.0


def ids(shape: str, n_tokens: int, device: str) -> Tensor:
    """int64 (T,), the same on every side; each is learned but the first."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(int(SHAPES[shape]["vocab_size"]), (n_tokens,), generator=draw).to(device)


def peaks(device: str) -> dict[str, int]:
    """The most bytes that torch had in use on the GPU, and took from it."""
    if device != "cuda":
        return {}
    return {"used_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
