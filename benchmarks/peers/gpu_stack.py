"""The side of transformers + PEFT + bitsandbytes on a GPU: QLoRA as their guide has it, over random weights.

`lean` leaves out what the guide does to the embedding, the head and the norms, which it makes float32.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from peers.gpu import ALPHA, DEVIATION, RANK, SHAPES, THETA, Built, serve


def quantized(linear: torch.nn.Linear, device: str) -> Linear4bit:
    """A layer of random NF4 weights with double quantization, as from_pretrained makes them with load_in_4bit."""
    kinds = {"compress_statistics": True, "quant_type": "nf4"}
    new = Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, device="meta", **kinds
    )
    size = (linear.out_features, linear.in_features)
    weight = torch.randn(size, dtype=torch.bfloat16, device=device).mul_(DEVIATION)
    new.weight = Params4bit(weight, requires_grad=False, **kinds).to(device)
    return new


def build(shape: str, lean: bool, device: str) -> Any:
    config = LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": THETA}, **SHAPES[shape])
    config.use_cache = False
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    setattr(block, name, quantized(linear, device))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                made = torch.ones if parameter.ndim == 1 else torch.randn
                value = made(parameter.shape, dtype=torch.bfloat16, device=device)
                value = value.mul_(DEVIATION) if parameter.ndim == 2 else value
                setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    model.is_loaded_in_4bit = True
    if lean:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    else:
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora).train()


def prepared(settings: dict[str, Any], row: Tensor) -> Built:
    model, ids = build(settings["shape"], settings["lean"], settings["device"]), row[None]  # (1, T)

    def loss() -> Tensor:
        with torch.autocast(row.device.type, torch.bfloat16):  # as transformers' Trainer with bf16=True
            return model(input_ids=ids, labels=ids).loss

    return [parameter for parameter in model.parameters() if parameter.requires_grad], loss, {}


if __name__ == "__main__":
    serve(prepared, json.loads(sys.argv[1]))
