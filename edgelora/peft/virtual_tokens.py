"""Virtual tokens on a built decoder: put there fresh, begun as real tokens, taken from a file, saved as PEFT does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgelora.architectures.config import ModelConfig
from edgelora.nn.cache import KeyValues
from edgelora.nn.decoder import Decoder
from edgelora.nn.layer import Attention
from edgelora.nn.scores import Scores
from edgelora.nn.virtual import Given, KeysValues, Virtual
from edgelora.peft.method import Method
from edgelora.peft.prefix_tuning import PrefixEncoder, flattened
from edgelora.peft.soft_prompt import PREFIXED, TrainedPrompt
from edgelora.peft.virtual_settings import VirtualTokens


def put_before(decoder: Decoder, row: Method, settings: VirtualTokens, seed: int) -> None:
    """Fresh ones of this method, begun as tokens drawn from the whole vocabulary where nothing else is asked."""
    assert row.before is not None
    device = decoder.model.norm.weight.device
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch's own start of each layer, which is PEFT's
        before = row.before(decoder.config, settings).to(device)
        drawn = torch.randint(0, decoder.config.vocab_size, (before.length,))
    decoder.before = before
    if begins_real(row, settings):
        begin_as(decoder, drawn.tolist())


def begins_real(row: Method, settings: VirtualTokens) -> bool:
    """Whether they begin as real tokens."""
    return (
        "prompt_tuning_init" in row.virtual
        and not settings.prefix_projection
        and settings.prompt_tuning_init != "random"
    )


def begin_as(decoder: Decoder, ids: Sequence[int]) -> None:
    """Let the fresh ones on `decoder` be what it makes of these ids, which are repeated or cut to as many."""
    before = decoder.before
    assert before is not None
    n, device = before.length, decoder.model.norm.weight.device
    row = torch.tensor([ids[i % len(ids)] for i in range(n)], device=device)
    with torch.no_grad():
        if isinstance(before, PrefixEncoder):
            decoder.before = None
            before.begin(Virtual(n, past=_past(decoder, row)))
            decoder.before = before
        else:
            scale = decoder.config.embedding_multiplier / decoder.embeds_scale
            before.begin(Virtual(n, decoder.embedding.gather(row) * scale))


class _Kept(KeyValues):
    """All keys and values of a row, however narrow the layer's window."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, starts: list[int], prefix: int, how: Scores) -> Tensor:
        self.row = k, v
        return super().attend(q, k, v, starts, prefix, how)


def _past(decoder: Decoder, ids: Tensor) -> list[KeysValues]:
    """Keys and values of one sequence in every layer."""
    layers = [module for module in decoder.modules() if isinstance(module, Attention)]
    caches = [_Kept() for _ in layers]
    try:
        for layer, cache in zip(layers, caches, strict=True):
            layer.cache = cache
        decoder(ids, torch.arange(len(ids), device=ids.device), [0, len(ids)])
    finally:
        for layer in layers:
            layer.cache = None
    return [cache.row for cache in caches]


def shapes(row: Method, config: ModelConfig, settings: VirtualTokens) -> list[tuple[int, ...]]:
    """Of what is trained; no memory is taken."""
    assert row.before is not None
    with torch.device("meta"):
        return [tuple(parameter.shape) for parameter in row.before(config, settings).parameters()]


def given(prompt: TrainedPrompt) -> Given:
    """What a folder of PEFT's holds, for a decoder to run behind."""
    if prompt.embeddings is not None:
        return Given(Virtual(prompt.length, torch.from_numpy(prompt.embeddings)))
    assert prompt.keys is not None
    assert prompt.values is not None
    layers = zip(prompt.keys, prompt.values, strict=True)
    return Given(Virtual(prompt.length, past=[(torch.from_numpy(k), torch.from_numpy(v)) for k, v in layers]))


@torch.no_grad()
def saved(decoder: Decoder) -> np.ndarray:
    """float32 (n, width): what PEFT calls `prompt_embeddings`, the encoder run."""
    assert decoder.before is not None
    virtual: Virtual = decoder.before()
    flat = flattened(virtual) if virtual.embeddings is None else virtual.embeddings
    return flat.detach().to(torch.float32).cpu().numpy().copy()


def prompt_config(config: ModelConfig, row: Method, settings: VirtualTokens, base: str) -> dict[str, Any]:
    """What PEFT's adapter_config.json says of what `saved` gives."""
    prefixed, kv = row.peft_type == PREFIXED, config.num_key_value_heads
    own: dict[str, Any] = {}
    if "prompt_tuning_init" in row.virtual and not prefixed:
        own["prompt_tuning_init"] = "RANDOM"  # it has begun; of a text PEFT would ask for the tokenizer
    if "encoder_hidden_size" in row.virtual:
        width = kv * config.head_dim if prefixed else config.hidden_size
        own["encoder_hidden_size"] = settings.encoder_hidden_size or width
    if "encoder_reparameterization_type" in row.virtual:
        own["encoder_reparameterization_type"] = settings.encoder_reparameterization_type
    if prefixed:
        own["prefix_projection"] = settings.prefix_projection
    return {
        "peft_type": row.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "num_virtual_tokens": settings.num_virtual_tokens,
        "token_dim": kv * config.head_dim if prefixed else config.hidden_size,
        "num_transformer_submodules": 1,
        "num_attention_heads": kv if prefixed else config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        **own,
    }
