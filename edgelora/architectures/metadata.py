"""What a GGUF says of a model, and what of a model llama.cpp would compute otherwise. The way back of `read_gguf`."""

from __future__ import annotations

import numpy as np

from edgelora.architectures.config import SLIDING, Architecture, ModelConfig
from edgelora.architectures.rope import gguf_rope

Scalar = int | float | str | bool


def gguf_metadata(architecture: Architecture, config: ModelConfig) -> dict[str, Scalar | list[bool]]:
    """The keys that describe the model, by their full GGUF names."""
    c = config
    keys: dict[str, Scalar | list[bool]] = {
        "vocab_size": c.vocab_size,
        "context_length": context_in_llama_cpp(architecture, c),
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
    }
    rope, _ = gguf_rope(c.rope)
    keys |= {f"rope.{key}": value for key, value in rope.items()}
    if c.num_experts:
        keys |= {
            "expert_count": c.num_experts,
            "expert_used_count": c.num_experts_per_tok,
            "expert_feed_forward_length": c.moe_intermediate_size,
        }
    told = architecture.llama_cpp
    if told.states_window and (c.sliding_window is not None or told.states_no_window):
        keys["attention.sliding_window"] = c.sliding_window or 0
        if c.layer_types is not None:
            keys["attention.sliding_window_pattern"] = [kind == SLIDING for kind in c.layer_types]
    if c.rope_local is not None:
        keys["rope.freq_base_swa"] = c.rope_local.theta
    for field, key in told.keys.items():
        if (value := getattr(c, field)) is not None:
            keys[key] = value
    return {f"{architecture.gguf_name}.{key}": value for key, value in keys.items()}


def gguf_extra_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    """Tensors that a GGUF has beside the model's own: divisors of the rope's frequencies, float32."""
    return gguf_rope(config.rope)[1]


def context_in_llama_cpp(architecture: Architecture, config: ModelConfig) -> int:
    """How many tokens llama.cpp may see before it computes something else than the model.

    It ignores some windows; and in a context longer than LongRoPE's original one it takes the long factors for short
    prompts too.
    """
    limits = [config.max_position_embeddings]
    if not architecture.llama_cpp.applies_window:
        limits += [window for i in range(config.num_hidden_layers) if (window := config.window(i)) is not None]
    if config.rope.scaling == "longrope":
        limits.append(config.rope.original_max_position_embeddings)
    return min(limits)


def unlike_llama_cpp(architecture: Architecture, config: ModelConfig) -> list[str]:
    """What of this model llama.cpp would compute otherwise at any length, in words; empty: nothing."""
    a, c = architecture.llama_cpp, config
    faults = []
    if c.rope.divisors and not a.reads_rope_factors:
        faults.append(f"its {c.rope.scaling} rope scaling, which it ignores in this family")
    if (c.rope.beta_fast, c.rope.beta_slow, c.rope.truncate) != (32.0, 1.0, True):
        faults.append("the borders of its yarn scaling (beta_fast, beta_slow, truncate), for which it takes defaults")
    if c.rope.dim != c.head_dim and not a.rotates_partly:
        faults.append("heads that rotate in part, which it aborts on")
    if a.whole_heads and c.num_attention_heads * c.head_dim != c.hidden_size:
        faults.append("the width of its heads, for which it takes hidden_size / num_attention_heads")
    if (own := a.otherwise(c)) is not None:
        faults.append(own)
    return faults
