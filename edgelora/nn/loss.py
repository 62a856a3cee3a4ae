"""Cross-entropy straight from hidden states, so that T x vocabulary logits never exist (cf. arXiv:2410.10989)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgelora.nn.linear import Weight

POSITIONS = 128  # rows of logits alive at once: 128 x 49,152 floats are 24 MiB
VOCABULARY_ROWS = 8192  # rows of the head dequantized at once


def _slices(n_rows: int) -> list[tuple[int, int]]:
    return [(first, min(first + VOCABULARY_ROWS, n_rows)) for first in range(0, n_rows, VOCABULARY_ROWS)]


def logits(hidden: Tensor, head: Weight, softcap: float | None = None) -> Tensor:
    """hidden (P, d) → float32 logits (P, V), a slice of the vocabulary at a time, bent below `softcap` (Gemma 2)."""
    out = hidden.new_empty(len(hidden), head.shape[0])
    for first, last in _slices(head.shape[0]):
        part = out[:, first:last]
        torch.mm(hidden, head.rows(first, last).T, out=part)
        if softcap is not None:
            part.div_(softcap).tanh_().mul_(softcap)
    return out


def _log_sum_exp(z: Tensor) -> Tensor:
    """(P, V) → (P, 1) without a second (P, V) in memory."""
    top = z.amax(-1, keepdim=True)
    total = torch.zeros_like(top)
    for first, last in _slices(z.shape[1]):
        total += (z[:, first:last] - top).exp_().sum(-1, keepdim=True)
    return top + total.log()


class LinearCrossEntropy(torch.autograd.Function):
    """−log p(label) (P,) in nats: hidden (P, d), a frozen head (V, d), labels (P,).

    With `smoothing` ε the target is (1 − ε) of the label and ε spread evenly over the vocabulary (arXiv:1512.00567).
    The gradient of each position is computed in the forward pass, POSITIONS at a time, and only scaled in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Weight, labels: Tensor, softcap: float | None = None, smoothing: float = 0.0
    ) -> Tensor:
        nll = hidden.new_empty(len(hidden))
        d_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        for first in range(0, len(hidden), POSITIONS):
            part = slice(first, first + POSITIONS)
            z = logits(hidden[part], head, softcap)
            label = labels[part, None]
            log_sum = _log_sum_exp(z)
            target = z.gather(1, label)
            if smoothing:
                target.mul_(1 - smoothing).add_(z.mean(-1, keepdim=True), alpha=smoothing)
            nll[part] = (log_sum - target).squeeze(1)
            if d_hidden is not None:
                for row, last in _slices(head.shape[0]):
                    d_z = z[:, row:last]
                    slope = None if softcap is None else 1 - (d_z / softcap).square_()
                    d_z.sub_(log_sum).exp_()  # p
                    if smoothing:
                        d_z.sub_(smoothing / head.shape[0])
                    here = ((label >= row) & (label < last)).squeeze(1).nonzero().squeeze(1)
                    d_z[here, label[here, 0] - row] -= 1 - smoothing  # p − target
                    if slope is not None:
                        d_z.mul_(slope)
                    d_hidden[part].addmm_(d_z, head.rows(row, last))
        ctx.save_for_backward(d_hidden)
        return nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (d_hidden,) = ctx.saved_tensors
        return d_hidden * grads[0][:, None], None, None, None, None
