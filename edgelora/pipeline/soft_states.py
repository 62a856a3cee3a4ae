"""What torch computes behind a soft prompt or a prefix, and without it: for a check, in a child process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgelora.base.model import open_base
from edgelora.data.encode import Example
from edgelora.device import choose_products, compute_threads, computing
from edgelora.files.soft_prompt import Reference
from edgelora.peft.soft_prompt import read_trained_prompt
from edgelora.progress import OnProgress, Pace, Progress

if TYPE_CHECKING:
    import torch

    from edgelora.nn.decoder import Decoder


@dataclass(frozen=True)
class SoftStates:
    """Final hidden states float32 (n, d) that predict the learned tokens, and what follows the reference prompts."""

    bare: np.ndarray
    behind: np.ndarray
    reference: Reference


def soft_states(
    base_path: Path, folder: Path, examples: Sequence[Example], prompts: np.ndarray, on_progress: OnProgress
) -> SoftStates:
    """Of the examples one by one, and of reference prompts int32 (8, T)."""
    import torch

    from edgelora.base.decoder import build_decoder
    from edgelora.peft.virtual_tokens import given

    base = open_base(base_path)
    decoder = build_decoder(base)
    behind = given(read_trained_prompt(folder, base.config))
    states, logits, pace = [], [], Pace(2 * len(examples))
    with torch.no_grad(), computing(choose_products(), compute_threads()):
        for decoder.before in (None, behind):
            own = []
            for example in examples:
                hidden = _hidden(decoder, torch.from_numpy(example.input_ids))
                own.append(hidden[:-1][torch.from_numpy(example.loss_mask[1:])].numpy())
                speed, eta = pace.step(len(example))
                on_progress(Progress("check", pace.done, pace.total, tokens_per_s=speed, eta_s=eta))
            states.append(np.concatenate(own))
            last = torch.cat([_hidden(decoder, torch.from_numpy(ids.astype(np.int64)))[-1:] for ids in prompts])
            logits.append(decoder.logits_of(last).numpy())
    return SoftStates(states[0], states[1], Reference(prompts, logits[1], logits[0]))


def _hidden(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    import torch

    hidden: torch.Tensor = decoder(ids, torch.arange(len(ids)), [0, len(ids)])
    return hidden
