"""The decoder: embeddings → layers of attention and a gated MLP over a float32 residual stream → final norm.

One decoder for all families: an `Architecture` says which blocks a layer has, a `ModelConfig` how large they are. It
runs one packed row of tokens at a time and knows neither files nor adapters; modules bear HF's names.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from edgelora.architectures.config import Architecture, ModelConfig
from edgelora.architectures.names import FINAL_NORM
from edgelora.architectures.rope import Rope
from edgelora.nn.activations import GATES
from edgelora.nn.attention import SegmentAttention
from edgelora.nn.awake import Awake
from edgelora.nn.cache import KeyValues
from edgelora.nn.linear import Linear, Weight, together
from edgelora.nn.loss import LinearCrossEntropy, Target, logits, put_logits
from edgelora.nn.mixture import Expert, Mixture
from edgelora.nn.norm import RMSNorm, rms_norm
from edgelora.nn.offload import Offload
from edgelora.nn.primitives import bound_primitives
from edgelora.nn.recompute import is_replay, recomputed, run_again
from edgelora.nn.rotary import Rotary, rotary_tables
from edgelora.nn.scores import Scores
from edgelora.nn.shifted import shifted_attention
from edgelora.nn.trained_head import TrainedHeadCrossEntropy
from edgelora.nn.virtual import NOTHING, Before, KeysValues, Row, Virtual, behind_past
from edgelora.nn.vocabulary import Moved, Moves, NewRows, Vocabulary

Tables = dict[Rope, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Frozen:
    """All weights of a base model: matrices by HF's module names; norms and biases (`vectors`) by HF's tensor names."""

    matrices: Mapping[str, Weight]
    vectors: Mapping[str, Tensor]
    embedding: Weight
    head: Weight
    compute: torch.dtype = torch.float32
    """The dtype of matrix products and of what lies between them; the residual stream and norms are float32."""

    def linear(self, module: str) -> Linear:
        return Linear(self.matrices[module], self.vectors.get(f"{module}.bias"))


class NewWeight(Protocol):
    """What an adapter puts in the place of a norm's weight (d,)."""

    @property
    def weight(self) -> Tensor: ...

    def tensors(self) -> dict[str, Tensor]:
        """What is saved of it, by PEFT's names."""
        ...


class Norm(nn.Module):
    """x / rms(x) · w, where w is `weight`, or its `delta`'s. shift: what HF's weight lacks of w."""

    delta: NewWeight | None
    weight: Tensor

    def __init__(self, weight: Tensor, eps: float, dtype: torch.dtype = torch.float32, shift: float = 0.0) -> None:
        super().__init__()
        self.eps, self.dtype, self.shift = eps, dtype, shift
        self.delta = None
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return RMSNorm.apply(x, self._weight, self.eps, self.dtype)

    def plain(self, x: Tensor) -> Tensor:
        """The same values without a place in the graph."""
        return rms_norm(x, self._weight.detach(), self.eps, self.dtype)[0]

    @property
    def _weight(self) -> Tensor:
        return self.weight if self.delta is None else self.delta.weight


Adaptable: TypeAlias = Linear | Norm | Vocabulary
"""A layer that an adapter can change, by its `delta`."""


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
        if is_replay() and norms.after_mlp is None and isinstance(mlp, MLP):
            mlp = partial(mlp, read=False)  # the largest product of a layer, on which no gradient in it depends
        return self._around(x, norms.before_mlp, mlp, norms.after_mlp)

    def _around(self, x: Tensor, before: str | None, block: nn.Module | partial[Tensor], after: str | None) -> Tensor:
        saved: AbstractContextManager[None] = nullcontext()
        normed = x.to(self.compute)
        if before is not None:
            norm: Norm = getattr(self, before)
            normed = norm(x)
            saved = recomputed(normed, partial(norm.plain, x.detach()))
        with saved:
            y = block(normed)
            if after is not None:
                y = getattr(self, after)(y)
            return x + y if self.multiplier == 1.0 else torch.add(x, y, alpha=self.multiplier)


def final_norm(architecture: Architecture, config: ModelConfig, weight: Tensor) -> Norm:
    """The one behind all layers."""
    return Norm(weight, config.rms_norm_eps, shift=architecture.norm_shift)


class Body(nn.Module):
    def __init__(self, architecture: Architecture, config: ModelConfig, frozen: Frozen) -> None:
        super().__init__()
        self.embed_tokens = Vocabulary(frozen.embedding)
        self.layers = nn.ModuleList(Layer(architecture, config, frozen, i) for i in range(config.num_hidden_layers))
        self.norm = final_norm(architecture, config, frozen.vectors[f"{FINAL_NORM}.weight"])


def adaptable(part: nn.Module, prefix: str = "") -> dict[str, Adaptable]:
    """The layers of a decoder, or of a part of it whose name is `prefix`, that an adapter can change."""
    dot = "." if prefix else ""
    return {f"{prefix}{dot}{n}": m for n, m in part.named_modules() if isinstance(m, Adaptable)}


class Decoder(nn.Module):
    """A causal language model over frozen weights. `linears` and `norms` are the layers that adapters attach to."""

    def __init__(self, architecture: Architecture, config: ModelConfig, frozen: Frozen) -> None:
        super().__init__()
        bound_primitives()
        self.config, self.head, self.compute = config, frozen.head, frozen.compute
        self.model = Body(architecture, config, frozen)
        if not config.tie_word_embeddings:
            self.lm_head = Vocabulary(frozen.head)
        self.recompute = False
        """Whether a layer keeps its input alone, and is computed again in the backward pass."""
        self.offload = False
        """CUDA, with `recompute`: these inputs wait for the backward pass in the machine's memory."""
        self.noise: Callable[[Tensor, list[int]], Tensor] | None = None
        """While training, what is done to embeddings (T, d) of segments of these lengths (NEFTune)."""
        self.awake: Awake | None = None
        """Hears of each row before the layers do, where an aLoRA waits for its invocation."""
        self.group: int | None = None
        """The group of every layer's attention, whose segments must then share nothing."""
        self.before: Before | None = None
        """Virtual tokens before every sequence, whose embeddings are what HF calls `inputs_embeds`."""
        self.embeds_scale = config.embedding_multiplier if architecture.scales_embeds else 1.0
        """What such embeddings are multiplied by."""

    @property
    def embedding(self) -> Weight:
        """(V, d): the frozen rows; what is put here is what is computed with."""
        return self.model.embed_tokens.weight

    @embedding.setter
    def embedding(self, weight: Weight) -> None:
        self.model.embed_tokens.weight = weight

    @property
    def linears(self) -> dict[str, Linear]:
        return {name: module for name, module in self.named_modules() if isinstance(module, Linear)}

    @property
    def norms(self) -> dict[str, Norm]:
        return {name: module for name, module in self.named_modules() if isinstance(module, Norm)}

    @property
    def vocabularies(self) -> dict[str, Vocabulary]:
        """The embedding, and the head where that is another matrix."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Vocabulary)}

    @property
    def new_head(self) -> NewRows | Moves | None:
        """What an adapter makes of the head: other rows for some tokens, or what it adds to all."""
        return (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).delta

    @property
    def adaptable(self) -> dict[str, Adaptable]:
        """Every layer that an adapter can change, by its HF name."""
        return adaptable(self)

    @property
    def n_before(self) -> int:
        """How many virtual tokens stand before every sequence."""
        return 0 if self.before is None else self.before.length

    def forward(self, input_ids: Tensor, positions: Tensor, segment_starts: list[int], prefix: int = 0) -> Tensor:
        """Final hidden states float32 (T, d) of a packed row: ids (T,), positions (T,), n + 1 segment borders.

        The first `prefix` tokens are what every segment begins with (see `data/pack.py`). All are behind the virtual
        tokens of `before`, which are in neither ids nor positions nor hidden states.
        """
        c = self.config
        if self.awake is not None:
            self.awake.see(input_ids, positions, segment_starts, prefix)
        x: Tensor = self.model.embed_tokens(input_ids)
        if c.embedding_multiplier != 1.0:
            x = x * c.embedding_multiplier
        if self.noise is not None:
            x = self.noise(x, [b - a for a, b in itertools.pairwise([0, *segment_starts]) if b > a])
        virtual = self._virtual()
        row = virtual.before(Row(x, positions, segment_starts, prefix))
        ropes = {rope for i in range(c.num_hidden_layers) if (rope := c.rope_of(i)) is not None}
        tables = {rope: rotary_tables(row.positions, rope, row.starts, row.prefix) for rope in ropes}
        x = row.x
        with Offload() if self.offload else nullcontext():
            for layer, past in zip(self.model.layers, virtual.of_layers(c.num_hidden_layers), strict=True):
                run: Callable[[Tensor], Tensor] = partial(
                    layer, tables=tables, starts=row.starts, prefix=row.prefix, past=past
                )
                if self.awake is not None and self.recompute:
                    run = self.awake.remembered(run)
                x = run_again(run, x, [*layer.parameters(), *(past or ())]) if self.recompute else run(x)
        x = self.model.norm(x[virtual.rows :] if virtual.rows else x)
        return x if c.logits_scaling == 1.0 else x / c.logits_scaling

    def _virtual(self) -> Virtual:
        """What stands before this row; where sequences grow, it is in their keys and values already."""
        if self.before is None:
            return NOTHING
        cache = next(module.cache for module in self.modules() if isinstance(module, Attention))
        if cache is not None and cache.begun:
            return Virtual(self.before.length)
        virtual: Virtual = self.before()
        if virtual.embeddings is None or self.embeds_scale == 1.0:
            return virtual
        return replace(virtual, embeddings=virtual.embeddings * self.embeds_scale)

    def nll(self, hidden: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """−log p(label) (P,), in nats, over hidden states (P, d) as `forward` gives them and labels (P,)."""
        new, softcap = self.new_head, self.config.final_logit_softcapping
        if isinstance(new, Moves):
            how = Target(softcap, smoothing, self.compute)
            nll: Tensor = TrainedHeadCrossEntropy.apply(hidden, new.delta, self.head, labels, how)
            return nll
        how = Target(softcap, smoothing, self.compute, None if new is None else new.ids)
        return LinearCrossEntropy.apply(hidden, self.head, labels, how, None if new is None else new.rows)

    @torch.no_grad()
    def logits_of(self, hidden: Tensor) -> Tensor:
        """float32 (P, V) of hidden states (P, d) as `forward` gives them."""
        softcap, new = self.config.final_logit_softcapping, self.new_head
        if isinstance(new, Moves):
            return logits(hidden, Moved(self.head, new.delta), softcap)
        found = logits(hidden, self.head, softcap)
        return found if new is None else put_logits(found, hidden, new.ids, new.rows, softcap)

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """float32 (T, V) for one sequence of ids (T,)."""
        positions = torch.arange(len(input_ids), device=input_ids.device)
        return self.logits_of(self(input_ids, positions, [0, len(input_ids)]))
