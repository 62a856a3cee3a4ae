"""What the objectives over pairs have in common: packing, counting, and the numbers that are shown."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgelora.data.pack import Batch, pack
from edgelora.data.preference import Pair
from edgelora.nn.decoder import Decoder
from edgelora.training.objectives.micro_batches import fit
from edgelora.training.objectives.objective import Mean

SHOWN = (
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
)  # fmt: skip


class PairObjective:
    """Segments lie as chosen, rejected, chosen, rejected …; the loss of a step is the mean over its pairs."""

    rows: type = Pair
    shows: tuple[str, ...] = SHOWN

    def pack(self, rows: Sequence[Pair], max_tokens: int) -> list[Batch]:
        """Pairs stay whole. A pair alone in its batch has its prompt computed once for both answers."""
        examples = [(pair.chosen, pair.rejected) for pair in rows]
        return [pack([e for i in numbers for e in examples[i]]) for numbers in fit(examples, max_tokens)]

    def units(self, batch: Batch) -> float:
        return (len(batch.segment_starts) - 1) / 2

    def step_mean(self, _decoder: Decoder, _batches: Sequence[Batch]) -> Mean:
        return Mean(0.0, 0.0)


def two(of_segments: Tensor) -> tuple[Tensor, Tensor]:
    """(2n,) → what belongs to the chosen (n,), and to the rejected (n,)."""
    return of_segments[0::2], of_segments[1::2]


def shown(rewards: Tensor, log_p: Tensor) -> dict[str, Mean]:
    """The means of rewards (2n,) and log-probabilities (2n,), and how often the chosen answer has the higher reward."""
    (chosen, rejected), (log_p_chosen, log_p_rejected) = two(rewards.detach()), two(log_p.detach())
    is_right = (chosen > rejected).to(chosen.dtype)
    parts = (chosen, rejected, chosen - rejected, is_right, log_p_chosen, log_p_rejected)
    totals = torch.stack([part.sum() for part in parts]).tolist()  # one wait for a GPU, not six
    return {name: Mean(total, len(chosen)) for name, total in zip(SHOWN, totals, strict=True)}
