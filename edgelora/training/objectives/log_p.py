"""Log-probabilities of the answers in a packed row, under the adapter and under the frozen model."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from edgelora.data.pack import IGNORE, Batch, unshared
from edgelora.nn.decoder import Decoder
from edgelora.peft.inject import without_adapter


class Answers(NamedTuple):
    """Of each of the n segments of a batch: log p of its learned tokens, summed (n,), and their number (n,).

    Where tokens have weights, each log p is multiplied by its own, and `tokens` is the sum of them.
    """

    log_p: Tensor
    tokens: Tensor


def learned(batch: Batch) -> np.ndarray:
    """The positions (P,) after which a token is learned. None lies in the shared prefix (see `data/pack.py`)."""
    return np.flatnonzero(batch.labels != IGNORE)


def token_nll(decoder: Decoder, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """−log p (P,) of each learned token of `batch`, in nats, times its weight. T x vocabulary logits never exist."""
    device, awake = decoder.model.norm.weight.device, decoder.awake
    shares = awake is None or awake.shares(batch.input_ids, batch.segment_starts, batch.prefix)
    if batch.prefix and (decoder.group is not None or not shares):
        batch = unshared(batch)
    ids, positions, labels, rows = (
        torch.from_numpy(array).to(device) for array in (batch.input_ids, batch.positions, batch.labels, learned(batch))
    )
    hidden = decoder(ids, positions, list(batch.segment_starts), batch.prefix)
    nll = decoder.nll(hidden[rows], labels[rows], smoothing)
    return nll if batch.weights is None else nll * torch.from_numpy(batch.weights).to(device)[rows]


def answers(decoder: Decoder, batch: Batch) -> Answers:
    """What the decoder, as it stands, makes of each answer; differentiable."""
    nll = token_nll(decoder, batch)
    counts = np.diff(np.searchsorted(learned(batch), batch.segment_starts)).tolist()
    # a sum for each, not an index_add: the same bits each time, also on a GPU
    log_p = torch.stack([-part.sum() for part in torch.split(nll, counts)])
    return Answers(log_p, nll.new_tensor(answer_tokens(batch)))


def answer_tokens(batch: Batch) -> np.ndarray:
    """What the learned tokens of each segment count together (n,): their number, where they have no weights."""
    borders = np.searchsorted(learned(batch), batch.segment_starts)
    if batch.weights is None:
        return np.diff(borders)
    sums = np.append(0, np.cumsum(batch.weights[learned(batch)], dtype=np.float64))
    return np.diff(sums[borders]).astype(np.float32)  # MPS has no float64


def log_ratios(decoder: Decoder, batch: Batch) -> tuple[Tensor, Answers]:
    """log(π/π_ref) (n,) of each answer, differentiable, and what the policy π made of it.

    π_ref is the same decoder with the adapter switched off: no second model. It goes first, so that it needs no memory
    on top of the policy's activations. It is not kept for the next epoch: rows are packed anew then, which moves the
    last bits, and a run that goes on after a stop could not repeat what one without a stop has kept.
    """
    with torch.no_grad(), without_adapter(decoder):
        reference = answers(decoder, batch).log_p
    policy = answers(decoder, batch)
    return policy.log_p - reference, policy
