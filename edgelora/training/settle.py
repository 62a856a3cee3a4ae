"""What was left to us, chosen: every setting of a run that is None or `auto`, each with its reason."""

from __future__ import annotations

from dataclasses import replace

from edgelora.base.device_memory import parse_size
from edgelora.base.hold import choose_base_dtype
from edgelora.base.model import Base
from edgelora.config import TrainConfig
from edgelora.device import choose_device, choose_dtype, choose_products, free_memory_bytes
from edgelora.training.defaults import choose
from edgelora.training.footprint import Model
from edgelora.training.memory import Machine, Plan, plan, resident_bytes


def settle(config: TrainConfig, base: Base, memory: int | None = None) -> Plan:
    """The plan of a run, whose `config` leaves nothing open. memory: bytes it may take in all; None: what is free.

    Raises ConfigError for what cannot be here, and if nothing fits.
    """
    model, device = Model.of(base), choose_device(config.device)
    dtype = choose_dtype(config.dtype, device.value)
    machine = machine_of(device.value, parse_size(config.max_gpu_memory) if config.max_gpu_memory else memory)
    held = choose_base_dtype(config.base_dtype, base, machine.budget, dtype.value)
    settled, chosen = choose(config, model.n_weights)
    settled = settled.model_copy(update={"device": device.value, "dtype": dtype.value, "base_dtype": held.value})
    found = plan(model, settled, machine, base.config.max_position_embeddings)
    choices = {"device": device, "dtype": dtype, "products": choose_products(device.value), "base_dtype": held}
    return replace(found, choices=choices | chosen | found.choices)


def machine_of(device: str, memory: int | None = None) -> Machine:
    """The device with what is free on it, or with `memory` bytes in all."""
    if device.startswith("cuda"):
        import torch

        return Machine(device, torch.cuda.mem_get_info(device)[0] if memory is None else memory)
    mine, free_bytes = resident_bytes(), free_memory_bytes()
    left = None if free_bytes is None else free_bytes + (mine or 0)  # what this process has already is not free
    return Machine(device, left if memory is None else memory, mine)
