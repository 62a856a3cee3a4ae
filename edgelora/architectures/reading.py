"""What the families' readers share: the numbers that every decoder has, out of config.json or GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgelora.architectures.config import FULL, SLIDING
from edgelora.architectures.rope import read_gguf_rope, read_hf_rope
from edgelora.errors import BaseModelError
from edgelora.files.gguf import GGUFFile

LARGEST = 1 << 31


def number(config: Mapping[str, Any], key: str, default: float | None = None, kind: type = int) -> Any:
    """A number of a config.json; `default` where it is missing or null. Raises BaseModelError if it cannot be."""
    value: Any = config.get(key)
    value = default if value is None else value
    right = isinstance(value, int) if kind is int else isinstance(value, int | float)
    if not right or isinstance(value, bool) or not (0 < value < LARGEST):
        raise BaseModelError(
            what=f"config.json: {key} is {'missing' if value is None else repr(value)[:100]}",
            why="the model's dimensions cannot be known without it",
            fix="download the checkpoint again",
        )
    return kind(value)


def hf_dimensions(
    config: Mapping[str, Any], *, theta: float = 1e4, layer_type: str | None = None, context: int = 2048
) -> dict[str, Any]:
    """The fields of `ModelConfig` that all families share, from a config.json.

    `theta` and `context` stand in where it says nothing; `layer_type` is whose rope is read where layers differ.
    """
    d, heads = number(config, "hidden_size"), number(config, "num_attention_heads")
    head_dim = number(config, "head_dim", d // heads or None)
    longest = number(config, "max_position_embeddings", context)
    dims = {
        "hidden_size": d,
        "intermediate_size": number(config, "intermediate_size"),
        "num_hidden_layers": number(config, "num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": number(config, "num_key_value_heads", heads),
        "head_dim": head_dim,
        "vocab_size": number(config, "vocab_size"),
        "max_position_embeddings": longest,
        "rms_norm_eps": number(config, "rms_norm_eps", 1e-6, float),
        "rope": read_hf_rope({**config, "max_position_embeddings": longest}, head_dim, layer_type, theta),
        "tie_word_embeddings": config.get("tie_word_embeddings", False) is True,
    }
    check_heads(dims, "config.json")
    return dims


def gguf_dimensions(file: GGUFFile) -> dict[str, Any]:
    """The fields of `ModelConfig` that all families share, from a GGUF's metadata."""
    arch = file.architecture

    def need(key: str, default: int | None = None) -> int:
        value = _one_for_all_layers(file, f"{arch}.{key}")
        value = default if value is None else value
        if value is None or not 0 < value < LARGEST:
            raise BaseModelError(
                what=f"{file.path}: {arch}.{key} is {'missing' if value is None else value}",
                why="the model's dimensions cannot be known without it",
                fix="download or convert the model again",
            )
        return int(value)

    d, heads, layers = need("embedding_length"), need("attention.head_count"), need("block_count")
    head_dim = file.get(f"{arch}.attention.key_length", int, d // heads)
    if layers > len(file.tensors):
        raise BaseModelError(
            what=f"{file.path}: it claims {layers} layers and holds {len(file.tensors)} tensors",
            why="the metadata and the tensors of this file do not fit together",
            fix="download or convert the model again",
        )
    if "token_embd.weight" not in file.tensors:
        raise BaseModelError(
            what=f"{file.path}: it holds no token_embd.weight",
            why="this is an adapter or a part of a split model, not a whole base model",
            fix="pass the base model's GGUF file",
        )
    dims = {
        "hidden_size": d,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": need("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": _epsilon(file),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    check_heads(dims, str(file.path))
    value_dim = file.get(f"{arch}.attention.value_length", int, head_dim)
    if value_dim != head_dim:
        raise BaseModelError(
            what=f"{file.path}: heads of {head_dim} with values of {value_dim} cannot be",
            why="the heads of this family's queries, keys and values are of one width",
            fix="download or convert the model again",
        )
    return {**dims, "rope": read_gguf_rope(file, head_dim)}


def _one_for_all_layers(file: GGUFFile, key: str) -> int | None:
    """An integer, or an array that says the same for each layer. Raises BaseModelError if layers differ."""
    value = file.metadata.get(key)
    if value is None or not isinstance(value.data, np.ndarray):
        found: int | None = file.get(key, int)
        return found
    if not len(value.data) or value.data.dtype.kind not in "iu" or (value.data != value.data[0]).any():
        raise BaseModelError(
            what=f"{file.path}: {key} differs from layer to layer",
            why="edgelora computes models whose layers are alike",
            fix="use another base",
        )
    return int(value.data[0])


def _epsilon(file: GGUFFile) -> float:
    key = f"{file.architecture}.attention.layer_norm_rms_epsilon"
    value = file.get(key, float)
    if value is None or not 0 < value < 1:
        raise BaseModelError(
            what=f"{file.path}: {key} is {'missing' if value is None else value}",
            why="llama.cpp needs it, and another value changes every activation",
            fix="download or convert the model again",
        )
    return float(value)


def check_heads(dims: Mapping[str, Any], where: str) -> None:
    """Raises BaseModelError, naming `where` it stands, for heads that cannot be grouped or rotated."""
    heads, kv_heads, head_dim = (dims[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    if head_dim < 2 or head_dim % 2 or kv_heads < 1 or heads % kv_heads:
        raise BaseModelError(
            what=f"{where}: {heads} heads of {head_dim} with {kv_heads} key-value heads cannot be",
            why="query heads share key-value heads evenly and rotate an even width",
            fix="download or convert the model again",
        )


def hf_layer_types(config: Mapping[str, Any], layers: int, default: tuple[str, ...]) -> tuple[str, ...]:
    """`layer_types` of a config.json, `default` where it has none."""
    found = config.get("layer_types")
    if found is None:
        return default
    if not isinstance(found, list) or len(found) != layers or not set(map(str, found)) <= {FULL, SLIDING}:
        raise BaseModelError(
            what="config.json: layer_types does not say full_attention or sliding_attention for each layer",
            why="which tokens a layer sees cannot be known without it",
            fix="download the checkpoint again",
        )
    return tuple(found)


def optional_window(config: Mapping[str, Any], default: int | None = None) -> int | None:
    """`sliding_window` where the checkpoint uses one. A null switches it off; a missing key gives `default`."""
    if config.get("use_sliding_window", True) is False or config.get("sliding_window", default) is None:
        return None
    return int(number(config, "sliding_window", default))


def every(period: int, layers: int) -> tuple[str, ...]:
    """Every `period`-th layer looks at all tokens, those between at a window."""
    return tuple(FULL if (i + 1) % period == 0 else SLIDING for i in range(layers))


def gguf_pattern(file: GGUFFile, layers: int, default: tuple[str, ...]) -> tuple[str, ...]:
    """The sliding window pattern of a GGUF: a period, or a flag for each layer; `default` where it has none."""
    key = f"{file.architecture}.attention.sliding_window_pattern"
    value = file.metadata.get(key)
    if value is None:
        return default
    if isinstance(value.data, int) and 0 < value.data < LARGEST:
        return every(value.data, layers)
    flags = file.get(key, list)
    if len(flags) < layers:
        raise BaseModelError(
            what=f"{file.path}: {key} speaks of {len(flags)} layers, there are {layers}",
            why="which tokens a layer sees cannot be known without it",
            fix="download or convert the model again",
        )
    return tuple(SLIDING if flags[i] else FULL for i in range(layers))


def require_act(config: Mapping[str, Any], key: str, default: str, known: tuple[str, ...] = ("silu",)) -> str:
    """The activation of a config.json. Raises BaseModelError for one that the family's GGUF cannot state."""
    act = config.get(key, default)
    if act not in known:
        raise BaseModelError(
            what=f"config.json: the activation {act!r} is not known for this family",
            why=f"models of this family use {' or '.join(known)}",
            fix="use another base",
        )
    return str(act)


def hf_experts(config: Mapping[str, Any], count: str, *, width: str) -> dict[str, Any]:
    """The fields of `ModelConfig` that describe a mixture, from a config.json."""
    n, used = number(config, count), number(config, "num_experts_per_tok")
    return _experts("config.json", n, used, number(config, width))


def gguf_experts(file: GGUFFile, *, width: str) -> dict[str, Any]:
    """The same from a GGUF's metadata; `width` is the key of an expert's intermediate size."""
    arch = file.architecture
    n, used, wide = (int(file.get(f"{arch}.{key}", int, 0)) for key in ("expert_count", "expert_used_count", width))
    return _experts(str(file.path), n, used, wide)


def _experts(where: str, n: int, used: int, width: int) -> dict[str, Any]:
    if not 0 < used <= n < 1 << 16 or not 0 < width < LARGEST:
        raise BaseModelError(
            what=f"{where}: {used} of {n} experts of {width} cannot be",
            why="a mixture chooses some of its experts for each token",
            fix="download or convert the model again",
        )
    return {"num_experts": n, "num_experts_per_tok": used, "moe_intermediate_size": width}


def upper_window(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Qwen's windows: off unless `use_sliding_window`, and from layer `max_window_layers` upwards."""
    window = optional_window(config, 4096) if config.get("use_sliding_window", False) else None
    if window is None:
        return {"sliding_window": None}
    first = config.get("max_window_layers")
    first = 28 if first is None else first
    if not isinstance(first, int):
        raise BaseModelError(
            what=f"config.json: max_window_layers is {first!r}",
            why="which tokens a layer sees cannot be known without it",
            fix="download the checkpoint again",
        )
    default = tuple(SLIDING if i >= first else FULL for i in range(layers))
    return {"sliding_window": window, "layer_types": hf_layer_types(config, layers, default)}
