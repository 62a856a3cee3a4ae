"""The training loop: packed micro-batches → gradients → AdamW. Knows no files: it takes examples and a decoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from edgelora.config import TrainConfig
from edgelora.data.encode import Example
from edgelora.data.pack import IGNORE, Batch, best_fit, n_steps, steps
from edgelora.errors import EdgeloraError
from edgelora.nn.decoder import Decoder
from edgelora.progress import OnProgress, Pace, Progress, silent

MAX_BAD_STEPS = 3


@dataclass(frozen=True)
class Result:
    """What a run learned: the loss of each step (mean over its tokens), and how many steps were not finite."""

    losses: list[float]
    held_out_loss: float | None
    skipped_steps: int
    tokens_per_s: float


def batch_loss(decoder: Decoder, batch: Batch) -> torch.Tensor:
    """Sum of −log p over the tokens of `batch` that are learned."""
    ids, positions = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.positions)
    hidden = decoder(ids, positions, list(batch.segment_starts), batch.prefix)
    labels = torch.from_numpy(batch.labels)
    learned = labels != IGNORE
    return decoder.nll(hidden[learned], labels[learned]).sum()


@torch.no_grad()
def held_out_loss(decoder: Decoder, examples: Sequence[Example], max_tokens: int) -> float:
    """Mean −log p over all answer tokens of `examples`, in nats."""
    batches = best_fit(examples, max_tokens)
    total = sum(float(batch_loss(decoder, b)) for b in batches)
    return total / sum(b.n_loss_tokens for b in batches)


def learning_rate_at(step: int, total: int, warmup: int) -> float:
    """The share of the peak learning rate at `step` (from 0): linear up over `warmup`, then linear down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


def train(
    decoder: Decoder,
    parameters: list[torch.nn.Parameter],
    examples: Sequence[Example],
    held_out: Sequence[Example],
    config: TrainConfig,
    on_progress: OnProgress = silent,
    peak_bytes: Callable[[], int | None] = lambda: None,
) -> Result:
    """Train `parameters` of `decoder` in place. Deterministic on CPU under config.seed.

    A step whose loss or gradient is not finite is skipped and counted; MAX_BAD_STEPS in a row stop the run.
    """
    total = n_steps(len(examples), config.batch_rows, config.epochs)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, foreach=True)
    warmup = min(config.warmup_steps, total // 2)
    pace, losses, skipped, in_a_row = Pace(total), [], 0, 0
    plan = steps(examples, config.batch_rows, config.micro_batch_tokens, config.epochs, config.seed)
    speed = 0.0
    for number, batches in enumerate(plan):
        rate = config.learning_rate * learning_rate_at(number, total, warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _accumulate(decoder, batches)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        if torch.isfinite(norm) and math.isfinite(loss):
            optimizer.step()
            in_a_row = 0
        else:
            skipped, in_a_row = skipped + 1, in_a_row + 1
        optimizer.zero_grad(set_to_none=True)
        if in_a_row == MAX_BAD_STEPS:
            raise not_finite(f"in {in_a_row} steps in a row (step {number + 1})", config.learning_rate)
        losses.append(loss)
        speed, eta = pace.step(sum(b.n_tokens for b in batches))
        on_progress(Progress(
            "train", number + 1, total, loss=loss, learning_rate=rate, tokens_per_s=speed, eta_s=eta,
            peak_bytes=peak_bytes(),
        ))  # fmt: skip
    final = held_out_loss(decoder, held_out, config.micro_batch_tokens) if held_out else None
    return Result(losses, final, skipped, speed)


def not_finite(when: str, learning_rate: float) -> EdgeloraError:
    return EdgeloraError(
        what=f"the loss was not a finite number {when}",
        why="the learning rate is too high for this model, or the base holds broken weights",
        fix=f"try --learning-rate {learning_rate / 5:g}",
    )


def _accumulate(decoder: Decoder, batches: Sequence[Batch]) -> float:
    """Add up the gradients of all micro-batches; every learned token of the step weighs the same."""
    n_tokens = sum(b.n_loss_tokens for b in batches)
    total = 0.0
    for batch in batches:
        loss = batch_loss(decoder, batch) / n_tokens
        loss.backward()
        total += float(loss.detach())
    return total
