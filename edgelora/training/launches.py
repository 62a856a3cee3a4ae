"""How the kernels of a pass are launched on a CUDA card: recorded and repeated as one graph, or one by one."""

from __future__ import annotations

import numpy as np

from edgelora.architectures.config import Architecture, ModelConfig
from edgelora.config import TrainConfig
from edgelora.device import Choice
from edgelora.peft.methods import METHODS

RECORDED, ONE_BY_ONE = "recorded", "one by one"


def longest_row(config: TrainConfig, lengths: np.ndarray) -> int:
    """About how many tokens a packed row of a run has at most."""
    assert config.micro_batch_tokens is not None
    return max(config.micro_batch_tokens, int(lengths.max()))


def choose_launches(
    config: TrainConfig, architecture: Architecture, model: ModelConfig, has_flash: bool = True, processes: int = 1
) -> Choice:
    """Whether passes through the layers are recorded as CUDA graphs (`nn/graphs.py`), for a settled config.

    has_flash: whether FlashAttention is there, for numbers that are as narrow as it takes them.
    """
    why = None
    if not config.cuda_graphs:
        why = "cuda_graphs is off"
    elif processes > 1:
        why = "passes are not recorded where several processes share a step"
    elif config.dtype != "bf16" or not has_flash or model.attn_logit_softcapping is not None:
        why = "attention goes tile by tile, and Python looks where segments begin"
    elif architecture.experts is not None:
        why = "each row goes to other experts, which Python reads"
    elif not METHODS[config.method].repeats:
        why = f"only of a plain LoRA are passes recorded, which the method {config.method} is not"
    elif config.lora_dropout:
        why = "dropout is drawn anew for each pass"
    if why is not None:
        return Choice(ONE_BY_ONE, why)
    return Choice(RECORDED, "rows of a length that comes again are one CUDA graph: Python launches kernels too slowly")
