"""Llama: SmolLM2, TinyLlama and every model that calls itself LlamaForCausalLM without rope scaling."""

from __future__ import annotations

from edgelora.architectures.config import Architecture, ModelConfig
from edgelora.errors import BaseModelError
from edgelora.files.gguf import GGUFFile


def read_config(file: GGUFFile) -> ModelConfig:
    """The dimensions from a GGUF's metadata. Raises BaseModelError for what this family's decoder does not compute."""

    def need(key: str) -> int:
        value = file.get(f"llama.{key}", int)
        if value is None or not 0 < value < 1 << 31:
            raise BaseModelError(
                what=f"{file.path}: llama.{key} is {'missing' if value is None else value}",
                why="the model's dimensions cannot be known without it",
                fix="download or convert the model again",
            )
        return int(value)

    unsupported = [
        key for key in file.metadata
        if key.startswith("llama.rope.scaling.") or key in ("llama.expert_count", "llama.attention.sliding_window")
    ]  # fmt: skip
    if unsupported:
        raise BaseModelError(
            what=f"{file.path}: {', '.join(unsupported)} cannot be computed yet",
            why="rope scaling, experts and sliding windows change what the model computes",
            fix="use a plain Llama-family model, such as SmolLM2 or TinyLlama",
        )
    d, heads = need("embedding_length"), need("attention.head_count")
    kv_heads = file.get("llama.attention.head_count_kv", int, heads)
    head_dim = file.get("llama.attention.key_length", int, d // heads)
    rotated = file.get("llama.rope.dimension_count", int, head_dim)
    if head_dim < 2 or head_dim % 2 or kv_heads < 1 or heads % kv_heads or rotated != head_dim:
        raise BaseModelError(
            what=f"{file.path}: {heads} heads of {head_dim} with {kv_heads} key-value heads cannot be",
            why="query heads share key-value heads evenly and rotate all of their (even) width",
            fix="download or convert the model again",
        )
    layers = need("block_count")
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
    return ModelConfig(
        model_type="llama",
        hidden_size=d,
        intermediate_size=need("feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        max_position_embeddings=need("context_length"),
        rms_norm_eps=float(file.get("llama.attention.layer_norm_rms_epsilon", float, 1e-5)),
        rope_theta=float(file.get("llama.rope.freq_base", float, 10000.0)),
        tie_word_embeddings="output.weight" not in file.tensors,
    )


def rotary_heads(config: ModelConfig) -> dict[str, int]:
    return {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}


LLAMA = Architecture(model_type="llama", gguf_name="llama", read_config=read_config, rotary_heads=rotary_heads)
