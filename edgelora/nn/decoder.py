"""The decoder: embeddings → layers over a float32 residual stream → final norm → losses or logits.

One decoder for all families: an `Architecture` says which blocks a layer has (`layer.py`), a `ModelConfig` how large
they are. It runs one packed row of tokens at a time and knows neither files nor adapters; modules bear HF's names.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from edgelora.architectures.config import Architecture, ModelConfig
from edgelora.architectures.names import FINAL_NORM
from edgelora.nn import gpu_attention
from edgelora.nn.awake import Awake
from edgelora.nn.frozen import Frozen
from edgelora.nn.gpu import has_triton
from edgelora.nn.graphs import Graphs
from edgelora.nn.layer import MLP, Attention, Layer
from edgelora.nn.linear import Linear, Weight
from edgelora.nn.loss import LinearCrossEntropy, Target, logits, put_logits
from edgelora.nn.norm import Norm
from edgelora.nn.offload import Offload
from edgelora.nn.primitives import bound_primitives
from edgelora.nn.recompute import run_again
from edgelora.nn.rotary import Tables, tables_of
from edgelora.nn.trained_head import TrainedHeadCrossEntropy
from edgelora.nn.virtual import NOTHING, Before, KeysValues, Row, Virtual
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


def through(
    layers: nn.ModuleList, recompute: bool, offload: bool, awake: Awake | None, x: Tensor, tables: Tables,
    starts: list[int], prefix: int = 0, pasts: Sequence[KeysValues | None] | None = None,
) -> Tensor:  # fmt: skip
    """What the last of these layers makes of x (T, d). pasts: of each, the keys and values before the row."""
    everything = isinstance(starts, gpu_attention.Borders)  # nothing of a recorded pass stays on the card
    with Offload(0 if everything else None) if offload else nullcontext():
        for layer, past in zip(layers, pasts or [None] * len(layers), strict=True):
            run: Callable[[Tensor], Tensor] = partial(layer, tables=tables, starts=starts, prefix=prefix, past=past)
            if awake is not None and recompute:
                run = awake.remembered(run)
            x = run_again(run, x, [*layer.parameters(), *(past or ())]) if recompute else run(x)
    return x


def recordable(layers: nn.ModuleList, compute: torch.dtype, device: torch.device) -> bool:
    """Whether a pass through these launches the same kernels for any numbers, and waits for none.

    FlashAttention is such a kernel. Where attention goes tile by tile, Python looks at where segments begin; and in a
    mixture it looks at what the router says.
    """
    return has_triton(device) and all(
        isinstance(layer, Layer) and isinstance(layer.mlp, MLP)
        and gpu_attention.takes(layer.self_attn.scores, layer.self_attn.head_dim, compute)
        and all(norm.delta is None for norm in layer.modules() if isinstance(norm, Norm))
        for layer in layers
    )  # fmt: skip


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
        self.graphs: Graphs | None = None
        """Passes through the layers that are recorded (`record_passes`)."""
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
        found = None
        if self.graphs is not None and virtual is NOTHING and self.awake is None and self.group is None:
            found = self.graphs(row.x, tables, row.starts, row.prefix)
        if found is None:
            found = self._through(row.x, tables, row.starts, row.prefix, virtual.of_layers(c.num_hidden_layers))
        x = self.model.norm(found[virtual.rows :] if virtual.rows else found)
        return x if c.logits_scaling == 1.0 else x / c.logits_scaling

    def record_passes(self, longest_row: int) -> None:
        """From now on, passes through the layers are recorded as CUDA graphs, where their work is always the same.

        Call it when the decoder is on its card, with its adapter. Does nothing where that cannot be: see `recordable`.
        longest_row: about how many tokens a packed row has at most.
        """
        layers, device = self.model.layers, self.model.norm.weight.device
        if recordable(layers, self.compute, device):
            self.graphs = Graphs(self._through, layers, device, self.recompute and self.offload, longest_row)

    @property
    def _through(self) -> Callable[..., Tensor]:
        """`through` its layers, as it is set up now."""
        return partial(through, self.model.layers, self.recompute, self.offload, self.awake)

    def running(self) -> AbstractContextManager[None]:
        """Train in here: where passes are recorded, everything has to be on one stream."""
        return nullcontext() if self.graphs is None else self.graphs.running()

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
