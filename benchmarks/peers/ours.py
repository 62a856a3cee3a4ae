"""The side of edgelora: its packed rows, decoder, adapter, objective and optimizer, as a run puts them together."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgelora.base.decoder import build_decoder
from edgelora.base.hold import choose_base_dtype
from edgelora.base.model import open_base
from edgelora.config import TrainConfig
from edgelora.data.dataset import load_examples
from edgelora.data.encode import Example
from edgelora.data.fit import Encoder
from edgelora.data.pack import Batch
from edgelora.device import choose_products, free_memory_bytes
from edgelora.nn import products
from edgelora.nn.decoder import Decoder
from edgelora.peft.inject import inject
from edgelora.training.objectives import objective_of
from edgelora.training.objectives.objective import held_out, mean_losses
from edgelora.training.optim import build_optimizer, set_share
from peers.channel import Turnstile
from peers.data import ALPHA, LEARNING_RATE, MAX_GRAD_NORM, RANK, batches, load, share

MICRO_BATCH_TOKENS = 1024  # of held-out rows
COMPUTE = {"f32": torch.float32, "bf16": torch.bfloat16}


class Run:
    """A decoder with its adapter, and how a step goes over it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.folder = Path(settings["folder"])
        self.config = TrainConfig(
            base=self.folder / settings["model"], data=self.folder / "messages.jsonl", out=self.folder / "adapter",
            rank=RANK, alpha=ALPHA, learning_rate=LEARNING_RATE, seed=settings["seed"] or 0,
        )  # fmt: skip
        base = open_base(self.config.base)
        if settings["data"] == "chats":  # from the words, as a user's run
            encoder = Encoder(base, base.config.max_position_embeddings)
            self.examples = list(load_examples([self.config.data[0].path], encoder))
        else:
            self.examples = load(self.folder / f"{settings['data']}.npz")
        self.held = choose_base_dtype(settings["held"], base, free_memory_bytes()).value
        self.decoder = build_decoder(base, self.held, COMPUTE[settings["dtype"]])
        self.decoder.recompute = settings["recompute"]
        self.micro_batch_tokens: int = settings["micro_batch_tokens"]
        self.parameters = inject(self.decoder, self.config.method, RANK, ALPHA, self.config.seed)
        self.objective = objective_of(self.config)
        self.optimizer = build_optimizer(self.decoder.named_parameters(), self.config)

    def pack(self, rows: list[Example]) -> list[Batch]:
        return self.objective.pack(rows, self.micro_batch_tokens)

    def backward(self, packed: list[Batch]) -> None:
        for scored in mean_losses(self.objective, self.decoder, packed, self.config):
            torch.autograd.backward(scored.loss)

    def held_out(self) -> dict[str, Any]:
        rows = load(self.folder / "held_out.npz")
        return {"loss": held_out(self.objective, self.decoder, rows, self.config, MICRO_BATCH_TOKENS)[0]}


def main(settings: dict[str, Any], turn: Turnstile) -> None:
    gc.freeze()  # as the command does: a collection would walk through all of torch in the midst of a step
    torch.set_float32_matmul_precision(choose_products().value)
    run = Run(settings)
    turn.facts = {"held": run.held, "compute": str(run.decoder.compute)}
    turn.handlers = {
        "held_out": lambda _: run.held_out(),
        "load": lambda asked: _load(_named(run.decoder), asked["adapter"]),
        "gradients": lambda asked: _gradients(run, asked),
        "profile": lambda asked: _profile(run, asked),
    }
    for number, rows in enumerate(batches(run.examples, settings["batch"], settings["seed"])):
        turn.begin()
        packed = run.pack(rows)
        run.backward(packed)
        torch.nn.utils.clip_grad_norm_(run.parameters, MAX_GRAD_NORM)
        set_share(run.optimizer, share(number, settings["total"]))
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        turn.end(tokens=sum(map(len, rows)), flops=sum(_flops(run.decoder, batch) for batch in packed))


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


def _gradients(run: Run, asked: dict[str, Any]) -> dict[str, Any]:
    """Gradients of the first batch, into the file `to`."""
    run.backward(run.pack(next(batches(run.examples, asked["batch"]))))
    grads = {name: parameter.grad for name, parameter in _named(run.decoder).items()}
    np.savez(asked["to"], **{name: grad.numpy() for name, grad in grads.items() if grad is not None})  # type: ignore[arg-type]
    run.optimizer.zero_grad(set_to_none=True)
    return {}


def _profile(run: Run, asked: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds that each operator of torch takes by itself in the first batch, the longest first."""
    packed, compute = run.pack(next(batches(run.examples, asked["batch"]))), products.compute
    products.compute = torch.profiler.record_function("sums of products")(compute)  # torch does not see it
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run.backward(packed)
    products.compute = compute
    run.optimizer.zero_grad(set_to_none=True)
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
