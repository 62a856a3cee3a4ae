"""One layer of the decoder: attention, then an MLP or experts, each with its norms and added to the residual stream."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edgelora.architectures.config import Architecture, ModelConfig
from edgelora.nn import compiled
from edgelora.nn.activations import GATES
from edgelora.nn.attention import SegmentAttention
from edgelora.nn.cache import KeyValues
from edgelora.nn.frozen import Frozen
from edgelora.nn.linear import together
from edgelora.nn.mixture import Expert, Mixture
from edgelora.nn.norm import Norm
from edgelora.nn.recompute import is_replay, recomputed
from edgelora.nn.rotary import Rotary, Tables
from edgelora.nn.scores import Scores
from edgelora.nn.scratch import room_like
from edgelora.nn.shifted import shifted_attention
from edgelora.nn.virtual import KeysValues, behind_past


class Attention(nn.Module):
    """Grouped-query attention; q, k and v come from a matrix each or from one (`fused`)."""

    def __init__(self, architecture: Architecture, config: ModelConfig, frozen: Frozen, layer: int) -> None:
        super().__init__()
        prefix = f"model.layers.{layer}.self_attn"
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads, config.num_key_value_heads, config.head_dim,
        )  # fmt: skip
        self.scores = Scores(config.attention_scale, config.window(layer), config.attn_logit_softcapping)
        self.rope = config.rope_of(layer)
        self.fused = architecture.fused
        if self.fused:
            self.qkv_proj = frozen.linear(f"{prefix}.qkv_proj")
        else:
            self.q_proj, self.k_proj, self.v_proj = (frozen.linear(f"{prefix}.{name}_proj") for name in "qkv")
        self.o_proj = frozen.linear(f"{prefix}.o_proj")
        self.q_norm = self.k_norm = None
        if architecture.qk_norm is not None:
            self.q_norm, self.k_norm = (
                Norm(
                    frozen.vectors[f"{prefix}.{name}_norm.weight"],
                    config.rms_norm_eps,
                    frozen.compute,
                    architecture.norm_shift,
                )
                for name in "qk"
            )
        self.norm_per_head = architecture.qk_norm == "head"
        self.cache: KeyValues | None = None
        """While sequences grow (`nn/generate.py`): their keys and values so far. None: a row is all there is."""
        self.group: int | None = None
        """While a LongLoRA learns: how many tokens attend to each other (`nn/shifted.py`)."""

    def forward(
        self, x: Tensor, tables: Tables, starts: list[int], prefix: int, past: KeysValues | None = None
    ) -> Tensor:
        if self.fused:
            sizes = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
            q, k, v = self.qkv_proj(x).split(sizes, dim=-1)  # (T, H·d), (T, KV·d), (T, KV·d)
        else:
            q, k, v = together(x, (self.q_proj, self.k_proj, self.v_proj))
        q, k = self._ready(q, self.q_norm, tables), self._ready(k, self.k_norm, tables)
        v = v.unflatten(-1, (-1, self.head_dim))
        attend = SegmentAttention.apply if self.cache is None else self.cache.attend
        if self.group is not None:
            assert not prefix
            assert past is None
            out = shifted_attention(q, k, v, starts, self.group, self.scores)
        elif past is None:
            out = attend(q, k, v, starts, prefix, self.scores)
        else:
            out = attend(*behind_past(q, k, v, past, starts, prefix), self.scores)[len(past[0]) :]
        return self.o_proj(out.flatten(1))

    def _ready(self, x: Tensor, norm: Norm | None, tables: Tables) -> Tensor:
        """Queries or keys (T, heads · d) → normed and rotated (T, heads, d)."""
        if norm is not None and not self.norm_per_head:
            x = norm(x)
        x = x.unflatten(-1, (-1, self.head_dim))
        if norm is not None and self.norm_per_head:
            x = norm(x)
        return x if self.rope is None else Rotary.apply(x, *tables[self.rope])


class MLP(nn.Module):
    """down(act(gate(x)) · up(x)); gate and up come from a matrix each or from one (`fused`)."""

    def __init__(self, architecture: Architecture, config: ModelConfig, frozen: Frozen, layer: int) -> None:
        super().__init__()
        prefix = f"model.layers.{layer}.mlp"
        self.fused, self.gate = architecture.fused, GATES[config.hidden_act]
        if self.fused:
            self.gate_up_proj = frozen.linear(f"{prefix}.gate_up_proj")
        else:
            self.gate_proj, self.up_proj = (frozen.linear(f"{prefix}.{name}_proj") for name in ("gate", "up"))
        self.down_proj = frozen.linear(f"{prefix}.down_proj")

    def forward(self, x: Tensor, read: bool = True) -> Tensor:
        if self.fused:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = together(x, (self.gate_proj, self.up_proj))
        hidden = self.gate.function.apply(gate, up)
        with recomputed(hidden, partial(self.gate.plain, gate.detach(), up.detach())):
            return self.down_proj(hidden, read)


class Residual(torch.autograd.Function):
    """x + m y: the residual stream x (T, d), float32, and what a block adds to it, in the dtype of its products.

    read: whether the values are, beside their gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, multiplier: float, read: bool = True) -> Tensor:
        ctx.multiplier, ctx.dtype = multiplier, y.dtype
        out = room_like(x)
        if not read:
            return out
        if compiled.usable(x) and compiled.usable(y) and x.dtype == torch.float32:
            rows, columns = x.numel() // x.shape[-1], x.shape[-1]
            narrow = compiled.NARROW[y.dtype]
            compiled.over_rows(
                "residual", rows, columns, x.contiguous(), y.contiguous(), out, columns, narrow, multiplier
            )
            return out
        return torch.add(x, y, alpha=multiplier, out=out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (dx,) = grads
        dy = dx if ctx.multiplier == 1.0 else dx * ctx.multiplier
        return dx, dy if dy.dtype == ctx.dtype else room_like(dy, ctx.dtype).copy_(dy), None, None


def _mixture(architecture: Architecture, config: ModelConfig, frozen: Frozen, layer: int) -> Mixture:
    names, prefix = architecture.experts, f"model.layers.{layer}"
    assert names is not None
    experts = [
        Expert(*(frozen.matrices[f"{prefix}.{names.experts}.{i}.{n}"] for n in (names.gate, names.up, names.down)))
        for i in range(config.num_experts)
    ]
    router = frozen.matrices[f"{prefix}.{names.router}"]
    return Mixture(router, experts, config.num_experts_per_tok, config.norm_topk_prob, config.hidden_act)


class Layer(nn.Module):
    """x + after(attention(before(x))), then the same with the MLP. The family says which of the norms there are."""

    def __init__(self, architecture: Architecture, config: ModelConfig, frozen: Frozen, layer: int) -> None:
        super().__init__()
        self.norms, self.multiplier, self.compute = architecture.norms, config.residual_multiplier, frozen.compute
        self.self_attn = Attention(architecture, config, frozen, layer)
        self.mlp = (MLP if architecture.experts is None else _mixture)(architecture, config, frozen, layer)
        for name in self.norms:
            if name is not None:
                weight = frozen.vectors[f"model.layers.{layer}.{name}.weight"]
                reads = name in (self.norms.before_attention, self.norms.before_mlp)
                compute = frozen.compute if reads else torch.float32
                self.add_module(name, Norm(weight, config.rms_norm_eps, compute, architecture.norm_shift))

    def forward(
        self, x: Tensor, tables: Tables, starts: list[int], prefix: int, past: KeysValues | None = None
    ) -> Tensor:
        norms = self.norms
        attend = partial(self.self_attn, tables=tables, starts=starts, prefix=prefix, past=past)
        x = self._around(x, norms.before_attention, attend, norms.after_attention)
        mlp: nn.Module | partial[Tensor] = self.mlp
        read = not (is_replay() and norms.after_mlp is None and isinstance(mlp, MLP))
        if not read:
            mlp = partial(mlp, read=False)  # the largest product of a layer, on which no gradient in it depends
        return self._around(x, norms.before_mlp, mlp, norms.after_mlp, read)

    def _around(
        self, x: Tensor, before: str | None, block: nn.Module | partial[Tensor], after: str | None, read: bool = True
    ) -> Tensor:
        saved: AbstractContextManager[None] = nullcontext()
        normed = x.to(self.compute)
        if before is not None:
            norm: Norm = getattr(self, before)
            normed = norm(x)
            if norm.keeps_input:  # in the place of what it gives
                saved = recomputed(normed, partial(norm.plain, x.detach()))
        with saved:
            y = block(normed)
        if after is not None:
            y = getattr(self, after)(y)
        return Residual.apply(x, y, self.multiplier, read)
