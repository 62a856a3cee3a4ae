"""What was left to us, chosen: every setting of a run that is None or `auto`, each with its reason."""

from __future__ import annotations

from math import prod

from edgelora.architectures.names import tensor_shapes
from edgelora.base.hold import choose_base_dtype
from edgelora.base.model import Base
from edgelora.config import TrainConfig
from edgelora.device import Choice, choose_device, choose_dtype, choose_products, free_memory_bytes
from edgelora.training.defaults import choose


def settle(config: TrainConfig, base: Base) -> tuple[TrainConfig, dict[str, Choice]]:
    """`config` with nothing left open, and why. Raises ConfigError for what cannot be here."""
    n_weights = sum(prod(shape) for shape in tensor_shapes(base.architecture, base.config).values())
    device = choose_device(config.device)
    choices = {"device": device, "dtype": choose_dtype(config.dtype, device.value)}
    choices["products"] = choose_products(device.value)
    choices["base_dtype"] = choose_base_dtype(config.base_dtype, base, free_memory_bytes())
    settled, chosen = choose(config, n_weights)
    values = {name: choices[name].value for name in ("device", "dtype", "base_dtype")}
    open_ = {
        "micro_batch_tokens": config.micro_batch_tokens or 768,
        "max_length": min(config.max_length or 1024, base.config.max_position_embeddings),
        "recompute": "off" if config.recompute == "auto" else config.recompute,
    }
    return settled.model_copy(update=values | open_), choices | chosen
