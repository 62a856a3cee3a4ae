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
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from edgelora.base.device_memory import hold_to
from peers.channel import Turnstile
from peers.gpu_shape import ALPHA, DEVIATION, LEARNING_RATE, MAX_GRAD_NORM, RANK, SHAPES, THETA, ids, peaks


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


def main(settings: dict[str, Any], turn: Turnstile) -> None:
    shape, device = settings["shape"], settings["device"]
    if settings["hold"]:
        hold_to(settings["hold"])
    torch.manual_seed(0)
    model = build(shape, settings["lean"], device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if device == "cuda":
        from bitsandbytes.optim import PagedAdamW8bit

        optimizer: Any = PagedAdamW8bit(parameters, lr=LEARNING_RATE)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    row = ids(shape, settings["tokens"], device)[None]  # (1, T)

    def step() -> float:
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=row, labels=row).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())  # waits for the GPU

    turn.facts = {"first_loss": step(), "parameters": sum(p.numel() for p in parameters)}
    turn.handlers = {"peaks": lambda _: peaks(device)}
    while True:
        turn.begin()
        step()
        turn.end(tokens=row.shape[1])


if __name__ == "__main__":
    turnstile = Turnstile()
    try:
        main(json.loads(sys.argv[1]), turnstile)
    except torch.OutOfMemoryError as e:
        turnstile.facts = {"out_of_memory": str(e).splitlines()[0]}
        turnstile.begin()
