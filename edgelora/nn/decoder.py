"""The decoder: embeddings → layers of attention and SwiGLU over a float32 residual stream → final norm.

It runs one packed row of tokens at a time and knows neither files nor adapters; modules bear HF's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from edgelora.architectures.config import ModelConfig
from edgelora.nn.attention import SegmentAttention
from edgelora.nn.layers import RMSNorm, Rotary, SwiGLU, rms_norm, rotary_tables, swiglu
from edgelora.nn.linear import Linear, Weight
from edgelora.nn.loss import logits
from edgelora.nn.recompute import recomputed


@dataclass(frozen=True)
class Frozen:
    """All weights of a base model, under HF's tensor names without `.weight`."""

    linears: Mapping[str, Weight]
    norms: Mapping[str, Tensor]
    embedding: Weight
    head: Weight


class Norm(nn.Module):
    weight: Tensor

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return RMSNorm.apply(x, self.weight, self.eps)

    def plain(self, x: Tensor) -> Tensor:
        """The same values without a place in the graph."""
        return rms_norm(x, self.weight, self.eps)[0]


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, frozen: Frozen, prefix: str) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            Linear(frozen.linears[f"{prefix}.{name}_proj"]) for name in "qkvo"
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, starts: list[int], prefix: int) -> Tensor:
        q, k, v = (proj(x).view(len(x), -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        out = SegmentAttention.apply(
            Rotary.apply(q, cos, sin), Rotary.apply(k, cos, sin), v, starts, prefix
        )  # (T, H, d)
        return self.o_proj(out.flatten(1))


class MLP(nn.Module):
    def __init__(self, frozen: Frozen, prefix: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            Linear(frozen.linears[f"{prefix}.{name}_proj"]) for name in ("gate", "up", "down")
        )

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        hidden = SwiGLU.apply(gate, up)
        with recomputed(hidden, partial(swiglu, gate.detach(), up.detach())):
            return self.down_proj(hidden)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, frozen: Frozen, prefix: str) -> None:
        super().__init__()
        self.input_layernorm = Norm(frozen.norms[f"{prefix}.input_layernorm"], config.rms_norm_eps)
        self.self_attn = Attention(config, frozen, f"{prefix}.self_attn")
        self.post_attention_layernorm = Norm(frozen.norms[f"{prefix}.post_attention_layernorm"], config.rms_norm_eps)
        self.mlp = MLP(frozen, f"{prefix}.mlp")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, starts: list[int], prefix: int) -> Tensor:
        normed = self.input_layernorm(x)
        with recomputed(normed, partial(self.input_layernorm.plain, x.detach())):
            x = x + self.self_attn(normed, cos, sin, starts, prefix)
        normed = self.post_attention_layernorm(x)
        with recomputed(normed, partial(self.post_attention_layernorm.plain, x.detach())):
            return x + self.mlp(normed)


class Body(nn.Module):
    def __init__(self, config: ModelConfig, frozen: Frozen) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, frozen, f"model.layers.{i}") for i in range(config.num_hidden_layers))
        self.norm = Norm(frozen.norms["model.norm"], config.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model over frozen weights. `linears` are the layers that adapters attach to."""

    def __init__(self, config: ModelConfig, frozen: Frozen) -> None:
        super().__init__()
        self.config, self.embedding, self.head = config, frozen.embedding, frozen.head
        self.model = Body(config, frozen)

    @property
    def linears(self) -> dict[str, Linear]:
        return {name: module for name, module in self.named_modules() if isinstance(module, Linear)}

    def forward(self, input_ids: Tensor, positions: Tensor, segment_starts: list[int], prefix: int = 0) -> Tensor:
        """Final hidden states float32 (T, d) of a packed row: ids (T,), positions (T,), n + 1 segment borders.

        The first `prefix` tokens are what every segment begins with (see `data/pack.py`).
        """
        x = self.embedding.gather(input_ids)
        cos, sin = rotary_tables(positions, self.config.head_dim, self.config.rope_theta)
        for layer in self.model.layers:
            x = layer(x, cos, sin, segment_starts, prefix)
        return self.model.norm(x)

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """float32 (T, V) for one sequence of ids (T,)."""
        return logits(self(input_ids, torch.arange(len(input_ids)), [0, len(input_ids)]), self.head)
