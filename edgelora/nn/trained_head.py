"""Cross-entropy under a head that is trained as a whole: beside `loss.py`'s, which a frozen head is enough for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgelora.nn.linear import Weight
from edgelora.nn.loss import Target, accumulate, logits_of, nll_of, parts, slices
from edgelora.nn.vocabulary import Moved, gradient_of


class TrainedHeadCrossEntropy(torch.autograd.Function):
    """−log p(label) (P,) in nats: hidden (P, d), a frozen head (V, d) to which `delta` (V, d) is added, labels (P,).

    The logits are computed again in the backward pass, a few positions at a time: a gradient of the head before it is
    known what each position counts for would be one for each position. It goes where it is summed up (`gradient_of`).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, delta: Tensor, head: Weight, labels: Tensor, how: Target) -> Tensor:
        ctx.save_for_backward(hidden, labels)
        ctx.delta, ctx.head, ctx.how = delta, Moved(head, delta), how
        nll = hidden.new_empty(len(hidden))
        for part, buffer in parts(hidden, head):
            nll[part], _ = nll_of(logits_of(hidden[part], ctx.head, how, buffer), labels[part], how, hidden.dtype)
        return nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (hidden, labels), head, how = ctx.saved_tensors, ctx.head, ctx.how
        d_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        d_head = gradient_of(ctx.delta) if ctx.needs_input_grad[1] else None
        dtype = how.compute or hidden.dtype
        for part, buffer in parts(hidden, head):
            _, d_z = nll_of(logits_of(hidden[part], head, how, buffer), labels[part], how, hidden.dtype)
            d_z *= grads[0][part, None]
            if d_hidden is not None:
                accumulate(d_hidden[part], d_z, head, dtype)
            if d_head is not None:
                for first, last in slices(head.shape[0]):
                    d_head[first:last].addmm_(d_z[:, first:last].T.to(hidden.dtype), hidden[part])
        return d_hidden, None, None, None, None
