"""HF tensor names ↔ GGUF tensor names, from llama.cpp's own map; nothing here is specific to a family."""

from __future__ import annotations

from functools import cache

import gguf
import numpy as np

from edgelora.architectures.config import Architecture, ModelConfig, rows_to_gguf, rows_to_hf


@cache
def _name_map(gguf_name: str, n_layers: int) -> gguf.TensorNameMap:
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == gguf_name)
    return gguf.get_tensor_name_map(arch, n_layers)


def gguf_module(architecture: Architecture, config: ModelConfig, module: str) -> str:
    """`model.layers.0.self_attn.q_proj` → `blk.0.attn_q`. Raises KeyError for a module llama.cpp has no name for."""
    name = _name_map(architecture.gguf_name, config.num_hidden_layers).get_name(module)
    if name is None:
        raise KeyError(module)
    return str(name)


def hf_modules(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of every linear layer of the decoder by its full HF name, in order."""
    return {
        f"model.layers.{i}.{name}": shape
        for i in range(config.num_hidden_layers)
        for name, shape in config.linears.items()
    }


def gguf_row_order(architecture: Architecture, config: ModelConfig, module: str) -> np.ndarray | None:
    """`gguf_rows = hf_rows[order]` for a linear whose rows GGUF permutes, else None."""
    heads = architecture.rotary_heads(config).get(module.split(".", 3)[-1])
    return None if heads is None else rows_to_gguf(hf_modules(config)[module][0], heads)


def hf_row_order(architecture: Architecture, config: ModelConfig, module: str) -> np.ndarray | None:
    """`hf_rows = gguf_rows[order]`: the inverse of `gguf_row_order`."""
    heads = architecture.rotary_heads(config).get(module.split(".", 3)[-1])
    return None if heads is None else rows_to_hf(hf_modules(config)[module][0], heads)
