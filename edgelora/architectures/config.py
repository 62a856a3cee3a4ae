"""What describes a model: its dimensions (`ModelConfig`) and its family (`Architecture`). Knows no tensors' values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from edgelora.architectures.rope import Rope
from edgelora.files.gguf import GGUFFile

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of one decoder, under the names of Hugging Face's config.json.

    Two are resolved rather than copied: `attention_multiplier` is the factor of q·k whatever a family calls it, and
    `rope` and `rope_local` say how full and sliding layers rotate.
    """

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
    rope: Rope
    tie_word_embeddings: bool
    hidden_act: str = "silu"
    attention_multiplier: float | None = None
    """None: 1 / sqrt(head_dim)."""
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    """FULL or SLIDING for each layer; None: all slide where there is a window, else all are full."""
    rope_local: Rope | None = None
    layers_without_rope: tuple[int, ...] = ()
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True

    @property
    def attention_scale(self) -> float:
        """What q·k is multiplied by before the softmax."""
        return self.head_dim**-0.5 if self.attention_multiplier is None else self.attention_multiplier

    def window(self, layer: int) -> int | None:
        """How many tokens back a layer looks, itself included; None: all of them."""
        slides = self.layer_types is None or self.layer_types[layer] == SLIDING
        return self.sliding_window if slides else None

    def rope_of(self, layer: int) -> Rope | None:
        """How a layer rotates q and k; None: not at all."""
        if layer in self.layers_without_rope:
            return None
        return self.rope_local if self.rope_local is not None and self.window(layer) else self.rope


class LayerNorms(NamedTuple):
    """The norms of a layer by where they stand, None where there is none."""

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None


PRE_NORM = LayerNorms("input_layernorm", None, "post_attention_layernorm", None)
POST_NORM = LayerNorms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
SANDWICH = LayerNorms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)


class Experts(NamedTuple):
    """Where a mixture keeps its parts inside a layer: the router, and an expert's matrices after `.{number}.`."""

    router: str
    experts: str
    gate: str
    up: str
    down: str


QKV = tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v", "qkv"))
ATTENTION_BIAS = {"attention_bias": (*QKV[:3], "self_attn.o_proj")}
MLP_BIAS = {"mlp_bias": tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))}


@dataclass(frozen=True)
class LlamaCpp:
    """What llama.cpp makes of a family, and what a GGUF says of it, where that is not simply the model."""

    applies_window: bool = False
    """Where not, an export ends its context at the window."""
    states_window: bool = False
    """Whether a GGUF says how wide the window is."""
    states_no_window: bool = False
    """Whether it also says, with a zero, that there is none: llama.cpp tells Phi-4 from Phi-3 by that."""
    rotates_partly: bool = False
    """Whether a part of each head may rotate; elsewhere llama.cpp aborts."""
    reads_rope_factors: bool = False
    """Whether a divisor for each frequency is read (Llama 3.1's bands, LongRoPE)."""
    whole_heads: bool = False
    """Whether the width of a head is taken to be hidden_size / num_attention_heads."""
    scales_embeds: bool = False
    """Whether it multiplies by `embedding_multiplier` what is given as embeddings, as it does those it looks up."""
    biases: tuple[str, ...] = QKV
    """The linear layers whose bias it loads where the file has one; a file with another does not load."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Fields of `ModelConfig` that a GGUF states besides the common ones, by their keys."""
    otherwise: Callable[[ModelConfig], str | None] = lambda _: None
    """What of this very model it would compute otherwise, in words; None: nothing."""


@dataclass(frozen=True)
class Architecture:
    """A family: how config.json and GGUF metadata become a `ModelConfig`, what blocks a layer has, and how GGUF stores
    its tensors. Every difference is stated here once and used in both directions."""

    model_type: str
    gguf_name: str
    read_hf: Callable[[Mapping[str, Any]], ModelConfig]
    """The model that a config.json describes. Raises BaseModelError for what is missing, odd or not computed here."""
    read_gguf: Callable[[GGUFFile], ModelConfig]
    """The same from a GGUF's metadata, as llama.cpp would read it: its defaults stand in for missing keys."""
    norms: LayerNorms = PRE_NORM
    norm_shift: float = 0.0
    """Norms multiply by their HF weight plus this, and GGUF stores the sum."""
    qk_norm: Literal["head", "row"] | None = None
    """A norm over each head of q and k, or over all heads together."""
    fused: bool = False
    """q, k and v are one matrix `qkv_proj`, gate and up another, `gate_up_proj`."""
    experts: Experts | None = None
    scales_embeds: bool = False
    """HF multiplies by `embedding_multiplier` what is given as embeddings (`inputs_embeds`), as those it looks up."""
    pairs_rotary_rows: bool = False
    """GGUF moves the rows of q and k so that llama.cpp's "normal" rope, of adjacent pairs, fits."""
    bias_settings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Settings of config.json that give all of these linear layers a bias."""
    llama_cpp: LlamaCpp = LlamaCpp()

    def layer_matrices(self, config: ModelConfig) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) of the linear layers of a decoder layer that adapters attach to, by HF name."""
        d, ff = config.hidden_size, config.intermediate_size
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        if self.fused:
            attention = {"self_attn.qkv_proj": (q + 2 * kv, d)}
        else:
            attention = {"self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
        attention["self_attn.o_proj"] = (d, q)
        if self.experts is not None:
            return attention
        if self.fused:
            return {**attention, "mlp.gate_up_proj": (2 * ff, d), "mlp.down_proj": (d, ff)}
        return {**attention, "mlp.gate_proj": (ff, d), "mlp.up_proj": (ff, d), "mlp.down_proj": (d, ff)}

    def before_down(self, module: str) -> str:
        """The layer whose rows multiply the columns of this down_proj, through SwiGLU; fused, its second half's."""
        return module.replace("down_proj", "gate_up_proj" if self.fused else "up_proj")

    def expert_matrices(self, config: ModelConfig) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) of the router and of every expert's matrices of a layer; empty without a mixture."""
        if self.experts is None:
            return {}
        d, ff, names = config.hidden_size, config.moe_intermediate_size, self.experts
        shapes = {names.router: (config.num_experts, d)}
        for i in range(config.num_experts):
            inside = f"{names.experts}.{i}"
            shapes |= {f"{inside}.{names.gate}": (ff, d), f"{inside}.{names.up}": (ff, d)}
            shapes[f"{inside}.{names.down}"] = (d, ff)
        return shapes

    def layer_norms(self, config: ModelConfig) -> dict[str, int]:
        """The width of every norm of a layer, by HF name."""
        widths = {name: config.hidden_size for name in self.norms if name is not None}
        if self.qk_norm is not None:
            heads = (1, 1) if self.qk_norm == "head" else (config.num_attention_heads, config.num_key_value_heads)
            widths["self_attn.q_norm"], widths["self_attn.k_norm"] = (n * config.head_dim for n in heads)
        return widths

    def rotary_heads(self, config: ModelConfig) -> dict[str, int]:
        """The linears whose rows GGUF permutes, with their number of heads."""
        if not self.pairs_rotary_rows:
            return {}
        return {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}


def rows_to_gguf(n_rows: int, n_heads: int) -> np.ndarray:
    """The order in which GGUF stores the rows of a rotary projection: `gguf = hf[rows_to_gguf(...)]`.

    HF rotates the halves (i, i + d/2) of a head, llama.cpp's "normal" rope adjacent pairs (2i, 2i + 1).
    """
    half = n_rows // n_heads // 2
    return np.arange(n_rows).reshape(n_heads, 2, half).swapaxes(1, 2).reshape(-1)


def rows_to_hf(n_rows: int, n_heads: int) -> np.ndarray:
    """The inverse: `hf = gguf[rows_to_hf(...)]`."""
    return np.argsort(rows_to_gguf(n_rows, n_heads))
