"""What both sides of `benchmarks/gpu.py` share: shapes, the row of tokens, and the life of a side; the peers' step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from edgelora.base.device_memory import hold_to
from peers.channel import Turnstile

# by the names of config.json (SmolLM2 with a head of its own); `tiny` is for trying the benchmark itself out, also
# without a GPU
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    },
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "max_position_embeddings": 8192,
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
WARM_UP = 2  # steps: the first compiles, the second still finds its memory

# What a side makes of its settings and the row of tokens (T,), of which all but the first are learned: the trainable
# parameters, the loss with a graph behind it, and facts to record.
Built = tuple[list[torch.nn.Parameter], Callable[[], Tensor], dict[str, Any]]


def begun(settings: dict[str, Any]) -> Tensor:
    """Hold this process to its share of the card, and draw the row of tokens (T,)."""
    if settings["hold"]:
        hold_to(settings["hold"])
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    return torch.randint(SHAPES[settings["shape"]]["vocab_size"], (settings["tokens"],), generator=draw)


def out_of_memory(turn: Turnstile, error: torch.OutOfMemoryError) -> None:
    """A fact, if it happens before the first steps are done."""
    turn.facts = {"out_of_memory": str(error).splitlines()[0]}
    turn.begin()


def serve(build: Callable[[dict[str, Any], Tensor], Built], settings: dict[str, Any]) -> None:
    """Build a side, take WARM_UP steps, and then as many as are asked for."""
    turn, device = Turnstile(), settings["device"]
    row = begun(settings).to(device)
    try:
        parameters, loss, facts = build(settings, row)
        optimizer = _optimizer(parameters, device)
        losses = [_step(parameters, loss, optimizer) for _ in range(WARM_UP)]
    except torch.OutOfMemoryError as e:
        return out_of_memory(turn, e)
    turn.facts = {"losses": losses, "parameters": sum(p.numel() for p in parameters), **facts}
    turn.handlers = {"peaks": lambda _: peaks(device)}
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


def peaks(device: str) -> dict[str, Any]:
    """The most bytes that torch had in use on the GPU, and took from it."""
    if device != "cuda":
        return {}
    return {"used_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
