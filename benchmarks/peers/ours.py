"""The side of edgelora: packed rows through its own decoder, adapter and loss."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgelora.base.decoder import build_decoder
from edgelora.base.hold import choose_base_dtype
from edgelora.base.model import open_base
from edgelora.data.conversation import read_conversations
from edgelora.data.encode import Example, encode_all
from edgelora.data.pack import Batch, best_fit
from edgelora.device import free_memory_bytes
from edgelora.nn.decoder import Decoder
from edgelora.peft.inject import inject
from edgelora.training.loop import batch_loss
from peers.channel import Turnstile
from peers.data import ALPHA, RANK, batches, learning_rate, load

MICRO_BATCH_TOKENS = 768
MAX_GRAD_NORM = 1.0
COMPUTE = {"f32": torch.float32, "bf16": torch.bfloat16}


def main(settings: dict[str, Any], turn: Turnstile) -> None:
    folder = Path(settings["folder"])
    base = open_base(folder / settings["model"])
    if settings["data"] == "chats":  # from the words, as a user's run
        examples = encode_all(read_conversations(folder / "messages.jsonl"), base.tokenizer, base.template, 1024)
    else:
        examples = load(folder / f"{settings['data']}.npz")
    held = choose_base_dtype(settings["held"], base, free_memory_bytes())
    decoder = build_decoder(base, held.value, COMPUTE[settings["dtype"]])
    parameters = inject(decoder, "lora", RANK, ALPHA, settings["seed"] or 0)
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, foreach=True)
    turn.facts = {"torch": torch.__version__, "held": held.value, "compute": str(decoder.compute)}
    turn.handlers = {
        "held_out": lambda _: {"loss": _held_out(decoder, load(folder / "held_out.npz"))},
        "load": lambda asked: _load(_named(decoder), asked["adapter"]),
        "gradients": lambda asked: _gradients(decoder, examples, asked),
        "profile": lambda asked: _profile(decoder, examples, asked),
    }
    for number, rows in enumerate(batches(examples, settings["batch"], settings["seed"])):
        turn.begin()
        packed = best_fit(rows, MICRO_BATCH_TOKENS)
        _backward(decoder, packed)
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.param_groups[0]["lr"] = learning_rate(number, settings["total"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turn.end(tokens=sum(map(len, rows)), flops=sum(_flops(decoder, batch) for batch in packed))


def _backward(decoder: Decoder, packed: list[Batch]) -> None:
    n_tokens = sum(batch.n_loss_tokens for batch in packed)
    for batch in packed:
        torch.autograd.backward(batch_loss(decoder, batch) / n_tokens)


@torch.no_grad()
def _held_out(decoder: Decoder, examples: list[Example]) -> float:
    packed = best_fit(examples, MICRO_BATCH_TOKENS)
    return sum(float(batch_loss(decoder, batch)) for batch in packed) / sum(batch.n_loss_tokens for batch in packed)


def _named(decoder: Decoder) -> dict[str, torch.nn.Parameter]:
    return {
        f"{name}.{part}": getattr(linear.delta, part)
        for name, linear in decoder.linears.items()
        for part in ("lora_A", "lora_B")
    }


@torch.no_grad()
def _load(named: dict[str, torch.nn.Parameter], adapter: str) -> dict[str, Any]:
    with np.load(adapter) as given:
        for name, parameter in named.items():
            parameter.copy_(torch.from_numpy(given[name]))
    return {}


def _gradients(decoder: Decoder, examples: list[Example], asked: dict[str, Any]) -> dict[str, Any]:
    """Gradients of the first batch, into the file `to`."""
    _backward(decoder, best_fit(next(batches(examples, asked["batch"])), MICRO_BATCH_TOKENS))
    grads = {name: parameter.grad for name, parameter in _named(decoder).items()}
    np.savez(asked["to"], **{name: grad.numpy() for name, grad in grads.items() if grad is not None})  # type: ignore[arg-type]
    decoder.zero_grad(set_to_none=True)
    return {}


def _profile(decoder: Decoder, examples: list[Example], asked: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds that each operator of torch takes by itself in the first batch, the longest first."""
    packed = best_fit(next(batches(examples, asked["batch"])), MICRO_BATCH_TOKENS)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        _backward(decoder, packed)
    decoder.zero_grad(set_to_none=True)
    found = {event.key: event.self_cpu_time_total / 1e3 for event in profiler.key_averages()}
    return dict(sorted(found.items(), key=lambda event: -event[1]))


def _flops(decoder: Decoder, batch: Batch) -> float:
    """Matrix work that a step needs (PERFORMANCE.md): what is computed twice to save memory is not counted twice.

    A frozen weight costs two passes (forward, and the gradient of its input) of 2 operations for each token, an adapter
    three; the head two at positions with loss; attention 6 products of head_dim for each query and key it may see.
    """
    c, n_tokens = decoder.config, len(batch.input_ids)
    shapes = [linear.weight.shape for linear in decoder.linears.values()]
    frozen = 4 * sum(rows * columns for rows, columns in shapes)
    adapter = 6 * RANK * sum(rows + columns for rows, columns in shapes)
    seen = float(np.sum(batch.positions + 1))
    attention = 12 * seen * c.num_attention_heads * c.head_dim * c.num_hidden_layers
    return n_tokens * (frozen + adapter) + 4 * batch.n_loss_tokens * c.hidden_size * c.vocab_size + attention


if __name__ == "__main__":
    turnstile = Turnstile()
    main(json.loads(sys.argv[1]), turnstile)
