"""Supervised fine-tuning: the cross-entropy of what the assistant says."""

from __future__ import annotations

from collections.abc import Sequence

from edgelora.data.encode import Example
from edgelora.data.pack import Batch, best_fit
from edgelora.nn.decoder import Decoder
from edgelora.training.objectives.log_p import token_nll
from edgelora.training.objectives.objective import Mean, Scored, Settings


class SFT:
    """−log p of each learned token; the loss of a step is the mean over all of them, wherever they are packed.

    Where tokens have weights, it is the weighted mean.
    """

    name = "sft"
    paper = "arXiv:2203.02155"  # section 3.5, "SFT"
    rows: type = Example
    shows: tuple[str, ...] = ()

    def pack(self, rows: Sequence[Example], max_tokens: int) -> list[Batch]:
        return best_fit(rows, max_tokens)

    def units(self, batch: Batch) -> float:
        return batch.loss_weight

    def step_mean(self, _decoder: Decoder, _batches: Sequence[Batch]) -> Mean:
        return Mean(0.0, 0.0)

    def loss(self, decoder: Decoder, batch: Batch, settings: Settings) -> Scored:
        return Scored(token_nll(decoder, batch, settings.label_smoothing).sum(), {})
