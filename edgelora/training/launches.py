"""How the kernels of a pass are launched on a CUDA card: recorded and repeated as one graph, or one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgelora.architectures.names import EMBEDDING, HEAD
from edgelora.config import TrainConfig
from edgelora.device import Choice
from edgelora.peft.methods import METHODS
from edgelora.training.base_footprint import Model
from edgelora.training.footprint import footprint
from edgelora.training.memory import Machine, Plan

RECORDED, ONE_BY_ONE = "recorded", "one by one"


def longest_row(config: TrainConfig, lengths: np.ndarray) -> int:
    """About how many tokens a packed row of a run has at most."""
    assert config.micro_batch_tokens is not None
    return max(config.micro_batch_tokens, int(lengths.max()))


def choose_launches(found: Plan, model: Model, has_flash: bool, processes: int = 1) -> Choice:
    """Whether passes through the layers are recorded as CUDA graphs (`nn/graphs.py`) in a run of this plan.

    has_flash: whether FlashAttention computes attention there.
    """
    why = _asked_otherwise(found.config, processes) or _other_each_time(found.config, model, has_flash)
    if why is None:
        taken = footprint(model, found.config, replace(found.load, recorded=True), "cuda").total
        room = Machine("cuda", found.budget).room
        if room is None or taken <= room:
            return Choice(RECORDED, "rows of a shape that comes again are one CUDA graph: Python launches too slowly")
        why = f"recorded ones have memory of their own: they would take {taken / 1e9:.2f} GB of {room / 1e9:.2f}"
    return Choice(ONE_BY_ONE, why)


def launches_again(before: Choice, config: TrainConfig, processes: int = 1) -> Choice:
    """What a run that goes on does, of which `before` was chosen when it began."""
    why = _asked_otherwise(config, processes)
    return before if why is None else Choice(ONE_BY_ONE, why)


def _asked_otherwise(config: TrainConfig, processes: int) -> str | None:
    if not config.cuda_graphs:
        return "cuda_graphs is off"
    return None if processes == 1 else "with several processes no passes are recorded: that was never tried"


def _other_each_time(config: TrainConfig, model: Model, has_flash: bool) -> str | None:
    """Why a pass does not launch the same for any row, or reads more than a LoRA's own matrices."""
    if not has_flash or model.config.attn_logit_softcapping is not None:
        return "attention goes tile by tile, and Python looks where segments begin"
    if model.architecture.experts is not None:
        return "each row goes to other experts, which Python reads"
    if not METHODS[config.method].repeats:
        return f"only of a plain LoRA are passes recorded, which the method {config.method} is not"
    if config.lora_dropout:
        return "dropout is drawn anew for each pass"
    if config.bias != "none" or {*config.modules_to_save} - {_last(EMBEDDING), _last(HEAD)}:
        return "only of a LoRA alone are passes recorded, and other parts of layers are trained beside it"
    return None


def _last(name: str) -> str:
    return name.rpartition(".")[2]
