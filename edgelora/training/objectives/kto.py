"""Kahneman-Tversky optimization: answers that are good or bad by themselves, without a pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgelora.data.encode import Example
from edgelora.data.pack import Batch, best_fit, pack
from edgelora.data.preference import Labelled
from edgelora.errors import DataError
from edgelora.nn.decoder import Decoder
from edgelora.training.objectives.log_p import log_ratios
from edgelora.training.objectives.micro_batches import fit
from edgelora.training.objectives.objective import Mean, Scored, Settings


@dataclass(frozen=True, kw_only=True)
class LabelledBatch(Batch):
    """`desirable` (n,) bool says of each segment whether it is an answer to give.

    `mismatched`: the prompts of these rows with answers of other rows of the step, for the KL term.
    """

    desirable: np.ndarray
    mismatched: tuple[Batch, ...]


class KTO:
    """1 − σ(β(h − z₀)) for an answer to give, 1 − σ(β(z₀ − h)) for one not to give, with h as in DPO (equation 7).

    The reference point z₀ = max(0, mean log π(y′|x)/π_ref(y′|x)) is an estimate of KL(π‖π_ref): each prompt x of the
    step is given the answer y′ of the row before it. Nothing is differentiated through it. TRL, whose formula this is,
    takes the mean over a micro-batch; here it is over the step, so that the size of micro-batches changes no gradient
    and a small one does not make the estimate worse. The loss of an answer to give is multiplied by λ_D
    (`desirable_weight`), that of the others by λ_U (equation 8), and the loss of a step is the mean over its rows. An
    adapter that does nothing has the loss ½, where both are 1.
    """

    name = "kto"
    paper = "arXiv:2402.01306"
    rows: type = Labelled
    shows: tuple[str, ...] = ("kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")

    def pack(self, rows: Sequence[Labelled], max_tokens: int) -> list[Batch]:
        """Raises DataError for a single row: another row's answer is needed."""
        if len(rows) == 1:
            raise DataError(
                what="one row is too few for the objective kto",
                why="its KL term is estimated from prompts with the answers of other rows",
                fix="give it two rows or more",
            )
        examples = [row.example for row in rows]
        others = _mismatched(examples)
        return [
            LabelledBatch(
                **vars(pack([examples[i] for i in numbers])),
                desirable=np.array([rows[i].desirable for i in numbers]),
                mismatched=tuple(best_fit([others[i] for i in numbers], max_tokens)),
            )
            for numbers in fit([[example] for example in examples], max_tokens)
        ]

    def units(self, batch: Batch) -> float:
        return len(batch.segment_starts) - 1

    @torch.no_grad()
    def step_mean(self, decoder: Decoder, batches: Sequence[Batch]) -> Mean:
        """log π/π_ref of the mismatched answers."""
        ratios = [log_ratios(decoder, part)[0] for batch in batches for part in _labelled(batch).mismatched]
        return Mean(sum(float(r.sum()) for r in ratios), sum(map(len, ratios)))

    def loss(self, decoder: Decoder, batch: Batch, settings: Settings) -> Scored:
        ratios, policy = log_ratios(decoder, batch)
        desirable = torch.from_numpy(_labelled(batch).desirable).to(ratios.device)
        kl = max(settings.step_mean, 0.0)  # in this order NaN is NaN, and the step a bad one
        weights = settings.desirable_weight, settings.undesirable_weight
        losses = prospect_losses(ratios, desirable, kl, settings.beta, weights)
        return Scored(losses.sum(), {"kl": Mean(kl, 1)} | _shown(settings.beta * ratios, policy.log_p, desirable))


def prospect_losses(
    ratios: Tensor, desirable: Tensor, kl: float, beta: float, weights: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """Log ratios (n,), which of the answers are to be given (n,) bool, z₀, (λ_D, λ_U) → the loss of each row (n,)."""
    gain = beta * (ratios - kl)
    losses = 1 - torch.sigmoid(torch.where(desirable, gain, -gain))
    return losses * torch.where(desirable, *weights)


def _mismatched(examples: Sequence[Example]) -> list[Example]:
    """Each prompt with the answer of the row before it, none longer than the longest row (the memory plan knows those).

    The prompt is what stands before the first learned token, the answer all from there on.
    """
    longest = max(map(len, examples))
    starts = [int(np.argmax(e.loss_mask)) for e in examples]
    made = []
    for i, (example, start) in enumerate(zip(examples, starts, strict=True)):
        other, begin = examples[i - 1], starts[i - 1]
        parts = zip(_arrays(example), _arrays(other), strict=True)
        ids, mask, weights = (np.concatenate([mine[:start], its[begin:]])[:longest] for mine, its in parts)
        made.append(Example(ids, mask, weights=weights))
    return made


def _arrays(example: Example) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    weights = example.loss_mask.astype(np.float32) if example.weights is None else example.weights
    return example.input_ids, example.loss_mask, weights


def _labelled(batch: Batch) -> LabelledBatch:
    assert isinstance(batch, LabelledBatch)
    return batch


def _shown(rewards: Tensor, log_p: Tensor, desirable: Tensor) -> dict[str, Mean]:
    """The means of rewards (n,) and log-probabilities (n,) over answers to give (chosen) and not to give (rejected)."""
    sums = {
        f"{what}/{kind}": (values.detach()[mask].sum(), mask.sum())
        for what, values in (("rewards", rewards), ("logps", log_p))
        for kind, mask in (("chosen", desirable), ("rejected", ~desirable))
    }
    totals = torch.stack([torch.stack([total, count]) for total, count in sums.values()]).tolist()
    return {name: Mean(*parts) for name, parts in zip(sums, totals, strict=True)}
