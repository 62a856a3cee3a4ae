"""The decoder: embeddings → layers over a float32 residual stream → final norm → losses or logits.

One decoder for all families: an `Architecture` says which blocks a layer has (`layer.py`), a `ModelConfig` how large
they are. It runs one packed row of tokens at a time and knows neither files nor adapters; modules bear HF's names.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from edgelora.architectures.config import Architecture, ModelConfig
from edgelora.architectures.names import FINAL_NORM
from edgelora.nn.awake import Awake
from edgelora.nn.frozen import Frozen
from edgelora.nn.layer import Attention, Layer
from edgelora.nn.linear import Linear, Weight
from edgelora.nn.loss import LinearCrossEntropy, Target, logits, put_logits
from edgelora.nn.norm import Norm
from edgelora.nn.offload import Offload
from edgelora.nn.primitives import bound_primitives
from edgelora.nn.recompute import run_again
from edgelora.nn.rotary import tables_of
from edgelora.nn.trained_head import TrainedHeadCrossEntropy
from edgelora.nn.virtual import NOTHING, Before, Row, Virtual
from edgelora.nn.vocabulary import Moved, Moves, NewRows, Vocabulary

Adaptable: TypeAlias = Linear | Norm | Vocabulary
"""A layer that an adapter can change, by its `delta`."""


class Noise(Protocol):
    """Embeddings (T, d) of a row, of which segments have these lengths behind a shared `prefix` → those with noise."""

    def __call__(self, x: Tensor, segment_lengths: list[int], *, prefix: int) -> Tensor: ...


def final_norm(architecture: Architecture, config: ModelConfig, weight: Tensor) -> Norm:
    """The one behind all layers."""
    return Norm(weight, config.rms_norm_eps, shift=architecture.norm_shift)


class Body(nn.Module):
    """What HF calls `model`: everything but the head."""

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
        self.noise: Noise | None = None
        """While training, what is done to embeddings (NEFTune)."""
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
        x = self._embedded(input_ids, segment_starts, prefix)
        virtual = self._virtual()
        row = virtual.before(Row(x, positions, segment_starts, prefix))
        tables = tables_of(c, row.positions, row.starts, row.prefix)
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

    def _embedded(self, input_ids: Tensor, segment_starts: list[int], prefix: int) -> Tensor:
        """(T, d), with noise where HF's embedding ends: what it multiplies `inputs_embeds` by is behind it."""
        x: Tensor = self.model.embed_tokens(input_ids)
        within = self.config.embedding_multiplier / self.embeds_scale
        if within != 1.0:
            x = x * within
        if self.noise is not None:
            x = self.noise(x, [b - a for a, b in itertools.pairwise(segment_starts)], prefix=prefix)
        return x if self.embeds_scale == 1.0 else x * self.embeds_scale

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
