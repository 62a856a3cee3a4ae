"""Where a CUDA card's memory goes in a run: as footprint.py, where buffers are given back when they are read."""

from __future__ import annotations

from math import prod

from edgelora.config import TrainConfig
from edgelora.nn.loss import VOCABULARY_ROWS_CUDA, positions
from edgelora.nn.shapes import multiple, step_of
from edgelora.peft.methods import METHODS
from edgelora.training.adapter_footprint import adapter_numbers, held_beside, optimizer_bytes, trains_head
from edgelora.training.base_footprint import Model, base_bytes
from edgelora.training.footprint import CUDA_CONTEXT, LOST, Footprint, Load, kept_by_a_layer, remade_bytes, tile_bytes
from edgelora.training.offloaded_adamw import VISITING


def on_a_card(model: Model, config: TrainConfig, load: Load, process: int | None = None) -> Footprint:
    """`footprint` where buffers are given back as soon as they are read: the peak is that of one of two moments.

    They are the loss, and the backward pass of a layer. Recorded passes have memory of their own (`nn/graphs.py`).
    """
    c, tokens, wide = model.config, load.tokens, 4 if config.dtype == "f32" else 2
    one, inputs = kept_by_a_layer(model, config, copied=False) + 4 * c.num_attention_heads, 4 * c.hidden_size
    numbers = adapter_numbers(model, config)
    if not load.recompute:
        kept = tokens * c.num_hidden_layers * one + (wide * numbers if wide == 2 else 0)
    else:  # with `offload` the next one is on its way
        kept = tokens * (inputs * (1 if config.offload else c.num_hidden_layers - 1) + one)
    passing, dense = _layer_in_passing(model, config, load)
    rows = positions(tokens, model.head[0][0], "cuda")
    slice_of_head = min(model.head[0][0], VOCABULARY_ROWS_CUDA) * c.hidden_size
    logits, head = 4 * rows * model.head[0][0], (wide + (8 if trains_head(model, config) else 0)) * slice_of_head
    at_the_loss = logits + head + tokens * (3 * inputs + wide * c.hidden_size)
    if load.recompute:
        at_the_loss -= tokens * one  # no layer is computed again then
    moments = optimizer_bytes(model, config)
    away = config.offload and config.optimizer == "adamw" and not METHODS[config.method].projects
    lossy, lost = at_the_loss > passing + dense, 1 + LOST["cuda"][config.dtype]
    activations = int((kept + (at_the_loss - logits - head if lossy else passing)) * lost)
    if load.recorded:  # one whose shape is new is launched beside what is held for those that are recorded
        longer = multiple(tokens + 1, step_of(tokens)) / tokens
        rows = inputs * tokens * (1 if load.recompute and config.offload else 2)
        activations += int(longer * (rows + (kept + passing) * lost)) + dense
    return Footprint(
        process=CUDA_CONTEXT if process is None else process,
        base=base_bytes(model, config.base_dtype, "cuda"),
        adapter=4 * (numbers * (2 if config.ema_decay else 1) + held_beside(model, config)),
        gradients=4 * numbers,
        optimizer=min(moments, VISITING) if away else moments,
        scratch=(head if lossy else dense) + remade_bytes(model, config),
        logits=logits if lossy else 0,
        activations=activations,
        offloaded=tokens * inputs * c.num_hidden_layers + (moments if away else 0) if config.offload else 0,
    )


def _layer_in_passing(model: Model, config: TrainConfig, load: Load) -> tuple[int, int]:
    """Bytes of gradients and of what is made again in the backward pass of a layer, and of its largest weight, dense.

    The weight is there while the gated unit's answer and its gradient are; then the gradients of both halves.
    """
    c, wide, tokens = model.config, 4 if config.dtype == "f32" else 2, load.tokens
    d, q, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    ff = c.intermediate_size if model.architecture.experts is None else c.num_experts_per_tok * c.moe_intermediate_size
    largest = max(prod(shape) for name, (shape, _) in model.matrices.items() if ".layers." in name)
    dense = 0 if config.base_dtype == config.dtype else wide * largest
    attended = (wide * (3 * q + 2 * kv) + 4 * q) * tokens  # FlashAttention sums the gradient of queries in float32
    if wide == 4 or c.attn_logit_softcapping is not None:  # tile by tile
        attended = (wide * (2 * q + 2 * kv) + 8 * kv) * tokens + tile_bytes(model, load)
    gated = max(2 * wide * ff * tokens, 3 * wide * ff * tokens - dense)
    return (4 + wide) * d * tokens + max(gated, attended - dense), dense
