"""Cross-entropy straight from hidden states, so that T x vocabulary logits never exist (cf. arXiv:2410.10989)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edgelora.nn import compiled, gpu, products
from edgelora.nn.card_pool import lent
from edgelora.nn.linear import Weight
from edgelora.nn.products import Sum
from edgelora.nn.scores import bent, slope_of_bent
from edgelora.nn.scratch import scratch

LOGITS = 24 << 18  # alive at once, 24 MiB of them: 128 positions of a vocabulary of 49,152
# the head comes out of its blocks for each piece, and products over few positions are slow there
LOGITS_CUDA = 64 << 20
VOCABULARY_ROWS = 8192  # rows of the head dequantized at once
VOCABULARY_ROWS_CUDA = 16384


def slices(n_rows: int, at_once: int = VOCABULARY_ROWS) -> list[tuple[int, int]]:
    """The first and last of the rows of a head that are dequantized at once."""
    return [(first, min(first + at_once, n_rows)) for first in range(0, n_rows, at_once)]


def logits(hidden: Tensor, head: Weight, softcap: float | None = None, out: Tensor | None = None) -> Tensor:
    """hidden (P, d) → float32 logits (P, V), a slice of the vocabulary at a time, bent below `softcap` (Gemma 2)."""
    out = hidden.new_empty(len(hidden), head.shape[0]) if out is None else out
    for first, last in slices(head.shape[0]):
        bent(
            products.product(hidden, products.factor(head, hidden.dtype, (first, last)).T, out[:, first:last]), softcap
        )
    return out


def put_logits(z: Tensor, hidden: Tensor, ids: Tensor, rows: Tensor, softcap: float | None = None) -> Tensor:
    """Of logits z (P, V) those of the tokens `ids` (k,), in place, as rows (k, d) in the head make them."""
    z[:, ids] = bent(hidden @ rows.T, softcap)
    return z


class Target(NamedTuple):
    """What cross-entropy asks for beside the label: a bent logit (Gemma 2), and ε of label smoothing.

    Factors of products may be rounded to `compute`; logits are float32 always, where bfloat16 would be off by a tenth
    of a nat.
    """

    softcap: float | None = None
    smoothing: float = 0.0
    compute: torch.dtype | None = None
    ids: Tensor | None = None
    """The tokens (k,) whose rows of the head are others than the frozen ones."""


class LinearCrossEntropy(torch.autograd.Function):
    """−log p(label) (P,) in nats: hidden (P, d), a frozen head (V, d), labels (P,), trained rows (k, d) of `how.ids`.

    With smoothing ε the target is (1 − ε) of the label and ε spread evenly over the vocabulary (arXiv:1512.00567).
    The gradient of each position is computed in the forward pass, a few at a time, and only scaled in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Weight,
        labels: Tensor,
        how: Target = Target(),  # noqa: B008
        rows: Tensor | None = None,
    ) -> Tensor:
        nll = hidden.new_empty(len(hidden))
        d_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        d_own: list[Tensor] = []
        with lent() if rows is None else nullcontext():  # all that is made in here is gone behind it
            for part, buffer in parts(hidden, head):
                z = logits_of(hidden[part], head, how, buffer)
                if rows is not None:
                    put_logits(z, hidden[part], _ids(how), rows, how.softcap)
                nll[part], d_z = nll_of(z, labels[part], how, hidden.dtype)
                if rows is not None:
                    d_own.append(d_z[:, how.ids].to(hidden.dtype))  # (P, k)
                    d_z[:, how.ids] = 0
                if d_hidden is not None:
                    accumulate(d_hidden[part], d_z, head, how.compute or hidden.dtype)
                    if rows is not None:
                        d_hidden[part].addmm_(d_own[-1], rows)
        ctx.save_for_backward(d_hidden, *((hidden, torch.cat(d_own)) if d_own else ()))
        return nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d_hidden, *of_rows), each = ctx.saved_tensors, grads[0][:, None]
        d_rows = None
        if of_rows:
            hidden, d_own = of_rows
            d_rows = (d_own * each).T @ hidden
        return None if d_hidden is None else d_hidden * each, None, None, None, d_rows


def _ids(how: Target) -> Tensor:
    assert how.ids is not None
    return how.ids


def positions(n: int, vocabulary: int, device: str) -> int:
    """How many of n positions have their logits at once."""
    return max(1, min(n, (LOGITS_CUDA if device == "cuda" else LOGITS) // vocabulary))


def parts(hidden: Tensor, head: Weight) -> Iterator[tuple[slice, Tensor]]:
    """Which of the positions of `hidden` have their logits at once, and memory (P, V) for these."""
    vocabulary = head.shape[0]
    step = positions(len(hidden), vocabulary, hidden.device.type)
    # a card's allocator has such memory at hand, and the backward pass needs it for other things
    if hidden.device.type == "cpu":
        buffer = scratch(step, vocabulary, hidden.dtype, use="logits")
    else:
        buffer = hidden.new_empty(step, vocabulary)
    for first in range(0, len(hidden), step):
        n = min(step, len(hidden) - first)
        yield slice(first, first + n), buffer[:n]


def logits_of(hidden: Tensor, head: Weight, how: Target, out: Tensor) -> Tensor:
    """As `logits`, of numbers rounded to bfloat16 where products of these can be summed and given in float32.

    They are some ten times faster on a CUDA card, and twice as fast on a CPU that has AVX512-BF16.
    """
    if how.compute != torch.bfloat16 or not (gpu.usable(hidden) or products.fit(hidden, torch.bfloat16)):
        return logits(hidden, head, how.softcap, out)
    narrow = hidden.to(torch.bfloat16)
    for first, last in slices(head.shape[0], VOCABULARY_ROWS_CUDA if hidden.is_cuda else VOCABULARY_ROWS):
        rows, part = head.rows(first, last, torch.bfloat16), out[:, first:last]
        if hidden.is_cuda:
            torch.mm(narrow, rows.T, out_dtype=torch.float32, out=part)
        else:
            products.compute(Sum(part, [(narrow, rows.T)]))
    return bent(out, how.softcap)


def nll_of(z: Tensor, labels: Tensor, how: Target, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """−log p(label) (P,), and its gradient (P, V), which takes the memory of the logits z."""
    narrow = (how.compute or dtype) == torch.bfloat16
    if compiled.usable(z) and z.dtype == torch.float32 and how.softcap is None and not how.smoothing:
        labels = labels.to(torch.int64).contiguous()
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < z.shape[1]:
            raise IndexError(f"a label is not one of {z.shape[1]} tokens")
        nll = torch.empty(len(z))
        compiled.over_rows("cross_entropy", *z.shape, z, labels, nll, z.shape[1], narrow)
        return nll, z.view(torch.bfloat16)[:, : z.shape[1]] if narrow else z
    if gpu.has_triton(z.device) and z.dtype == torch.float32 and how.softcap is None and not how.smoothing:
        found: tuple[Tensor, Tensor] = gpu.kernels().cross_entropy(z, labels, narrow)
        return found
    label = labels[:, None]
    slope = slope_of_bent(z, how.softcap)
    target = z.gather(1, label)
    if how.smoothing:
        target.mul_(1 - how.smoothing).add_(z.mean(-1, keepdim=True), alpha=how.smoothing)
    top = z.amax(-1, keepdim=True)
    p = torch.softmax(z, -1, out=z)
    # log Σ exp z from the likeliest token: p there is no less than 1 / V, so its logarithm is exact enough
    nll = (top - p.amax(-1, keepdim=True).log() - target).squeeze(1)
    d_z = p.scatter_add_(1, label, torch.full_like(target, how.smoothing - 1))
    if how.smoothing:
        d_z.sub_(how.smoothing / z.shape[1])
    return nll, d_z if slope is None else d_z.mul_(slope)


def accumulate(d_hidden: Tensor, d_z: Tensor, head: Weight, dtype: torch.dtype) -> None:
    """d_hidden (P, d) += d_z (P, V) @ head (V, d), computed in `dtype`, a slice of the vocabulary at a time."""
    for first, last in slices(head.shape[0], VOCABULARY_ROWS_CUDA if d_z.is_cuda else VOCABULARY_ROWS):
        part = d_z[:, first:last]
        products.add_product(d_hidden, part.to(dtype), products.factor(head, dtype, (first, last)))
