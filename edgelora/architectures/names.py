"""HF tensor names ↔ GGUF tensor names, from llama.cpp's own map; nothing here is specific to a family."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache
from typing import NamedTuple

import gguf
import numpy as np

from edgelora.architectures.config import Architecture, ModelConfig, rows_to_gguf, rows_to_hf

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens", "lm_head", "model.norm"

_EXPERT = re.compile(r"\.experts\.(\d+)\.")


class Place(NamedTuple):
    """Where a GGUF keeps an HF tensor: in the tensor `name`, as number `expert` of those stacked in it (or alone)."""

    name: str
    expert: int | None


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


def gguf_place(architecture: Architecture, config: ModelConfig, tensor: str) -> Place:
    """`model.layers.0.mlp.experts.3.up_proj.weight` → (`blk.0.ffn_up_exps.weight`, 3)."""
    module, _, suffix = tensor.rpartition(".")
    expert = _EXPERT.search(module)
    name = gguf_module(architecture, config, _EXPERT.sub(".experts.", module))
    return Place(f"{name}.{suffix}", int(expert[1]) if expert else None)


def linear_modules(architecture: Architecture, config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of every linear layer that adapters attach to, by its full HF name, in order."""
    shapes = architecture.layer_matrices(config)
    return {f"model.layers.{i}.{n}": shape for i in range(config.num_hidden_layers) for n, shape in shapes.items()}


def tensor_shapes(
    architecture: Architecture, config: ModelConfig, biased: Collection[str] = ()
) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a model by its HF name. `biased`: the matrices of a layer that have a bias."""
    d = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {f"{EMBEDDING}.weight": (config.vocab_size, d)}
    matrices = architecture.layer_matrices(config)
    norms, experts = architecture.layer_norms(config), architecture.expert_matrices(config)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{name}.weight": shape for name, shape in (matrices | experts).items()}
        shapes |= {f"{layer}.{name}.bias": (matrices[name][0],) for name in matrices if name in biased}
        shapes |= {f"{layer}.{name}.weight": (width,) for name, width in norms.items()}
    shapes[f"{FINAL_NORM}.weight"] = (d,)
    if not config.tie_word_embeddings:
        shapes[f"{HEAD}.weight"] = (config.vocab_size, d)
    return shapes


def is_norm(tensor: str) -> bool:
    """Whether this is a norm's weight, by its HF or GGUF name."""
    return tensor.endswith("norm.weight")


def gguf_row_order(architecture: Architecture, config: ModelConfig, module: str) -> np.ndarray | None:
    """`gguf_rows = hf_rows[order]` for a linear whose rows GGUF permutes, else None."""
    heads = architecture.rotary_heads(config).get(module.split(".", 3)[-1])
    return None if heads is None else rows_to_gguf(heads * config.head_dim, heads)


def hf_row_order(architecture: Architecture, config: ModelConfig, module: str) -> np.ndarray | None:
    """`hf_rows = gguf_rows[order]`: the inverse of `gguf_row_order`."""
    heads = architecture.rotary_heads(config).get(module.split(".", 3)[-1])
    return None if heads is None else rows_to_hf(heads * config.head_dim, heads)
