"""Memory that ran out in the midst of a run, though the plan said it fits: the plan's numbers, and what takes less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from edgelora.config import TrainConfig
from edgelora.errors import ConfigError
from edgelora.training.base_footprint import Model
from edgelora.training.footprint import Load, footprint
from edgelora.training.memory import SHARE, Machine, what_would_fit

WORDS = ("out of memory", "allocate memory", "alloc_failed")  # of torch's CPU and MPS, CUDA and cuBLAS, in any case
LESS = 0.2  # so much less of what a run takes, beside the process itself, is what is proposed


@contextmanager
def explained(model: Model, config: TrainConfig, longest: int) -> Iterator[None]:
    """Raise ConfigError where memory runs out in here. config: settled; longest: tokens of the longest row."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        text = str(e)
        of_memory = isinstance(e, MemoryError | torch.OutOfMemoryError)
        if not of_memory and not any(words in text.lower() for words in WORDS):
            raise
        raise _exhausted(model, config, longest, text.splitlines()[0] if text else "no more memory") from e


def _exhausted(model: Model, config: TrainConfig, longest: int, said: str) -> ConfigError:
    assert config.micro_batch_tokens is not None
    load = Load(max(longest, config.micro_batch_tokens), longest, config.recompute == "full")
    device = Machine(config.device, None)
    parts = footprint(model, config, load, device.kind)
    room = parts.process + (1 - LESS) * (parts.total - parts.process)
    less = what_would_fit(model, config, config, load, Machine(config.device, int(room / SHARE)))
    again = f"{less} --overwrite" if less.startswith("pass") else less
    graphs = device.kind == "cuda" and config.cuda_graphs
    go_on = "--resume" + ", with --no-cuda-graphs too where passes are recorded" * graphs
    return ConfigError(
        what=f"there was not enough memory for a step ({said})",
        why=f"the plan reckoned with {parts.total / 1e9:.2f} GB for {load.tokens} tokens (in MB: {parts.in_words()}); "
        "it was off, or something else has taken memory since",
        fix=f"free some memory and go on with {go_on}, or begin anew with what takes less: {again}",
    )
