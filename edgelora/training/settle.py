"""What was left to us, chosen: every setting of a run that is None or `auto`, each with its reason."""

from __future__ import annotations

from dataclasses import replace

import torch

from edgelora.base.device_memory import held_bytes
from edgelora.base.hold import choose_base_dtype
from edgelora.base.model import Base
from edgelora.config import TrainConfig
from edgelora.device import Choice, choose_device, choose_dtype, choose_products, free_memory_bytes
from edgelora.kernels import load
from edgelora.nn import compiled
from edgelora.nn.gpu import has_triton
from edgelora.nn.gpu_attention import takes
from edgelora.nn.scores import Scores
from edgelora.peft.methods import METHODS
from edgelora.training.avoided import avoided, why_avoided
from edgelora.training.base_footprint import Model
from edgelora.training.defaults import choose
from edgelora.training.invoked import invocation_of
from edgelora.training.memory import Machine, Plan, plan, resident_bytes
from edgelora.training.optim import require_optimizer
from edgelora.training.original import original_of, why_original
from edgelora.training.trained_tokens import tokens_of
from edgelora.training.unused import refuse_unused
from edgelora.training.whole import optimizer_of, rate_of_whole, require_whole, size_of

BLURRED = (
    "the part of the weights that A and B begin as is taken away whole, and A sees a share of it: the first step is "
    "not the base's but one with noise, which can cost more than it gains; PiSSA's authors take 0"
)


def settle(
    config: TrainConfig, base: Base, memory: int | None = None, processes: int = 1, on_this_machine: int = 1
) -> Plan:
    """The plan of a run, whose `config` leaves nothing open, as one of its `processes` sees it.

    memory: bytes that this one may take in all, on a machine that may be another one (`edgelora plan --memory`); None:
    its part of what is free here, which those `on_this_machine` share. Raises ConfigError for what cannot be here or
    would do nothing, and if nothing fits.
    """
    refuse_unused(config)
    shares = processes if config.shard_base else 1
    model, device = replace(Model.of(base), shares=shares), choose_device(config.device)
    dtype = choose_dtype(config.dtype, device.value)
    machine = here(config, device.value, on_this_machine) if memory is None else machine_of(device.value, memory)
    # of layers that are dealt out as much fits as into all processes together
    room = None if machine.budget is None else shares * machine.budget
    held = choose_base_dtype(config.base_dtype, base, room, dtype.value)
    settled, chosen = choose(config, model.n_weights)
    settled = settled.model_copy(update={"device": device.value, "dtype": dtype.value, "base_dtype": held.value})
    settled, of_invocation = invocation_of(tokens_of(settled, base), base)
    chosen |= of_invocation
    require_whole(settled, base)
    settled, of_optimizer = optimizer_of(settled, model, machine.budget)
    refuse_unused(settled)  # whose optimizer may be another one
    chosen |= of_optimizer | size_of(settled, model) | rate_of_whole(settled, model)
    if (original := original_of(settled, base)) is not None:
        chosen["original"] = why_original(original, base, held.value)
    if avoided(settled, base):
        chosen["start"] = why_avoided(settled)
    if settled.lora_dropout and METHODS[settled.method].starts_in_weight:
        chosen["lora_dropout"] = Choice(f"{settled.lora_dropout:g}", BLURRED)
    found = plan(model, settled, machine, base.config.max_position_embeddings)
    choices = {
        "device": device,
        "dtype": dtype,
        "products": choose_products(device.value),
        "attention": choose_attention(model.config.head_dim, device.value, dtype.value),
        "base_dtype": held,
    }
    return replace(found, choices=choices | chosen | found.choices)


def choose_attention(head_dim: int, device: str, dtype: str = "f32") -> Choice:
    """Who computes attention inside the segments of a packed row: compiled code, FlashAttention, or torch by tiles."""
    if _has_flash(head_dim, device, dtype):
        return Choice("flash", "torch's FlashAttention over segments; bent scores (Gemma 2) are left to tiles")
    if device != "cpu":
        return Choice(
            "torch", f"tile by tile, so that no scores of a whole row exist; the compiled code is not for {device}"
        )
    if load.library() is None:
        return Choice(
            "torch", "tile by tile; edgelora's C code was not compiled when it was installed; with it, it is faster"
        )
    if head_dim % compiled.LANES:
        return Choice("torch", f"tile by tile; the compiled code wants heads of a multiple of {compiled.LANES}")
    return Choice(
        "compiled", "flash attention for this CPU: over twice as fast as torch's products, and no scores in memory"
    )


def _has_flash(head_dim: int, device: str, dtype: str) -> bool:
    """What `gpu_attention.usable` asks of tensors, asked before there are any."""
    if not device.startswith("cuda") or dtype != "bf16":
        return False
    return takes(Scores(1.0), head_dim, torch.bfloat16) and has_triton(torch.device(device))


def here(config: TrainConfig, device: str, processes: int = 1) -> Machine:
    """This machine as a run of `config` may use it. Raises ConfigError for what is asked of `device` and it has not."""
    require_optimizer(config.optimizer, device)
    machine = machine_of(device, None, processes)
    if config.max_gpu_memory is None:
        return machine
    most = held_bytes(config.max_gpu_memory, device)
    return replace(machine, budget=most if machine.budget is None else min(most, machine.budget))


def machine_of(device: str, memory: int | None = None, processes: int = 1) -> Machine:
    """The device with what is free on it, or with `memory` bytes in all.

    Each of several `processes` has a card of its own, and its part of the machine's memory.
    """
    if device.startswith("cuda"):
        return Machine(device, torch.cuda.mem_get_info(device)[0] if memory is None else memory)
    mine, free_bytes = resident_bytes(), free_memory_bytes()
    # what this process has already is not free
    left = None if free_bytes is None else free_bytes // processes + (mine or 0)
    return Machine(device, left if memory is None else memory, mine)
