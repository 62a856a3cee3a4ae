"""What both sides of `benchmarks/gpu.py` share: shapes, the row of tokens, the optimizer, and the life of a side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from edgelora.base.device_memory import hold_to
from peers.channel import Turnstile

# by the names of config.json; `tiny` is for trying the benchmark itself out, also without a GPU
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    },
}  # fmt: skip
THETA = 500_000.0
DEVIATION = 0.02  # of the random weights
RANK, ALPHA, LEARNING_RATE, MAX_GRAD_NORM = 16, 32.0, 1e-4, 1.0

# What a side makes of its settings and the row of tokens (T,), of which all but the first are learned: the trainable
# parameters, the loss with a graph behind it, and facts to record.
Built = tuple[list[torch.nn.Parameter], Callable[[], Tensor], dict[str, Any]]


def serve(build: Callable[[dict[str, Any], Tensor], Built], settings: dict[str, Any]) -> None:
    """Build a side, take one step to warm up, and then as many as are asked for. Out of memory until then is a fact."""
    turn, device = Turnstile(), settings["device"]
    if settings["hold"]:
        hold_to(settings["hold"])
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    row = torch.randint(SHAPES[settings["shape"]]["vocab_size"], (settings["tokens"],), generator=draw).to(device)
    try:
        parameters, loss, facts = build(settings, row)
        optimizer = _optimizer(parameters, device)
        first_loss = _step(parameters, loss, optimizer)
    except torch.OutOfMemoryError as e:
        turn.facts = {"out_of_memory": str(e).splitlines()[0]}
        turn.begin()
        return
    turn.facts = {"first_loss": first_loss, "parameters": sum(p.numel() for p in parameters), **facts}
    turn.handlers = {"peaks": lambda _: _peaks(device)}
    while True:
        turn.begin()
        _step(parameters, loss, optimizer)
        turn.end(tokens=len(row))


def _optimizer(parameters: list[torch.nn.Parameter], device: str) -> Any:
    if device != "cuda":
        return torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    from bitsandbytes.optim import PagedAdamW8bit

    return PagedAdamW8bit(parameters, lr=LEARNING_RATE)


def _step(parameters: list[torch.nn.Parameter], loss: Callable[[], Tensor], optimizer: Any) -> float:
    value = loss()
    torch.autograd.backward(value)
    torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(value.detach())  # waits for the GPU


def _peaks(device: str) -> dict[str, Any]:
    """The most bytes that torch had in use on the GPU, and took from it."""
    if device != "cuda":
        return {}
    return {"used_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
