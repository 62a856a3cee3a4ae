"""Base → decoder in torch. Quantized weights stay in their blocks, in HF's row order; nothing is dequantized here."""

from __future__ import annotations

import torch

from edgelora.architectures.names import hf_modules, hf_row_order
from edgelora.base.model import Base
from edgelora.base.weights import Dense, GGUFBlocks, from_rows
from edgelora.nn.decoder import Decoder, Frozen


def build_decoder(base: Base) -> Decoder:
    """A decoder over the blocks of `base`. Only rotary projections are copied (their rows move), the rest is mapped."""

    def norm(tensor: str) -> torch.Tensor:
        return from_rows(base.file.rows(tensor), base.file.tensors[tensor].type, d).dequantize().reshape(-1).clone()

    def weight(tensor: str, module: str | None = None) -> Dense | GGUFBlocks:
        rows = base.file.rows(tensor)
        order = hf_row_order(base.architecture, base.config, module) if module else None
        return from_rows(rows if order is None else rows[order], base.file.tensors[tensor].type, info(tensor)[-1])

    def info(tensor: str) -> tuple[int, ...]:
        return base.file.tensors[tensor].shape

    d = base.config.hidden_size
    norms = {"model.norm": norm("output_norm.weight")}
    for i in range(base.config.num_hidden_layers):
        norms[f"model.layers.{i}.input_layernorm"] = norm(f"blk.{i}.attn_norm.weight")
        norms[f"model.layers.{i}.post_attention_layernorm"] = norm(f"blk.{i}.ffn_norm.weight")
    embedding = weight("token_embd.weight")
    frozen = Frozen(
        linears={module: weight(base.tensor_of(module), module) for module in hf_modules(base.config)},
        norms=norms,
        embedding=embedding,
        head=embedding if base.config.tie_word_embeddings else weight("output.weight"),
    )
    return Decoder(base.config, frozen)
