"""The arithmetic of composing one layer: what TIES (arXiv:2306.01708) and DARE (arXiv:2311.03099) do to its tensors.

A task tensor is what an adapter changes: ΔW (d_out, d_in), or one of its factors. All in float32, but for the SVD of a
small core, which is in float64. Knows nothing of adapters and files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from edgelora.peft.adapter import LoraPair

Thinning: TypeAlias = Literal["largest", "random"]


@dataclass(frozen=True)
class Composed:
    """The LoRA of one layer, the squared Frobenius norm of the whole ΔW, and of what the rank left out of it."""

    pair: LoraPair
    whole: float
    lost: float = 0.0


def thin(tensor: np.ndarray, thinning: Thinning, density: float, draw: np.random.Generator) -> np.ndarray:
    """`tensor` with the share `density` of its entries, the others zero.

    largest: the largest (TIES, section 3, step 1), of equally large ones at the edge all. random: any, divided by the
    density, so that the mean stays (DARE, section 3).
    """
    if density >= 1:
        return tensor
    if thinning == "random":
        return np.where(kept_at_random(tensor.shape, density, draw), tensor / np.float32(density), 0)
    sizes = np.abs(tensor)
    n_dropped = tensor.size - int(density * tensor.size)
    if n_dropped == tensor.size:
        return np.zeros_like(tensor)
    edge = np.partition(sizes, n_dropped, axis=None)[n_dropped]
    return np.where(sizes >= edge, tensor, np.float32(0))


def kept_at_random(shape: tuple[int, ...], density: float, draw: np.random.Generator) -> np.ndarray:
    """A mask, True with the probability `density`."""
    return draw.random(shape, np.float32) < density


def together(tensors: Sequence[np.ndarray], weights: Sequence[float], *, elects: bool) -> np.ndarray:
    """Σ wᵢ tᵢ, float32; with `elects` (TIES, section 3, steps 2 and 3) the mean of those that have the elected sign.

    It is elected for each entry, as in PEFT before the weights: one that is taken away votes for what it learned.
    """
    joined = np.zeros_like(tensors[0])
    if not elects:
        for tensor, weight in zip(tensors, weights, strict=True):
            joined += np.float32(weight) * tensor
        return joined
    total = np.zeros_like(joined)
    for tensor in tensors:
        total += tensor
    elected = np.where(total >= 0, np.int8(1), np.int8(-1))
    del total
    count = np.zeros(joined.shape, np.int16)
    for tensor, weight in zip(tensors, weights, strict=True):
        agrees = np.sign(tensor) == elected  # a zero, dropped or not, agrees with nobody
        joined += np.where(agrees, np.float32(weight) * tensor, 0)
        count += agrees
    joined /= np.maximum(count, 1)
    return joined


def stacked(pairs: Sequence[LoraPair], weights: Sequence[float]) -> LoraPair:
    """Σ wᵢ Bᵢ Aᵢ as one pair of rank Σ rᵢ: [w₁B₁ w₂B₂ …] and [A₁; A₂; …]."""
    b = np.concatenate([np.float32(w) * pair.b for pair, w in zip(pairs, weights, strict=True)], axis=1)
    return LoraPair(np.concatenate([pair.a for pair in pairs]), b)


def truncated(pair: LoraPair, rank: int | None) -> Composed:
    """The best pair of at most `rank` for the same ΔW; as it is where it has no more, or `rank` is None.

    ΔW = B A = Q_b (R_b R_aᵀ) Q_aᵀ with B = Q_b R_b and Aᵀ = Q_a R_a: the SVD is of an r × r core.
    """
    if rank is None or pair.rank <= rank:
        squared = np.sum((pair.b.T.astype(np.float64) @ pair.b) * (pair.a.astype(np.float64) @ pair.a.T))
        return Composed(pair, whole=float(squared))
    q_b, r_b = np.linalg.qr(pair.b.astype(np.float64))
    q_a, r_a = np.linalg.qr(pair.a.T.astype(np.float64))
    u, s, vt = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return _cut(q_b @ u[:, :rank], s, vt[:rank] @ q_a.T, rank)


def leading(change: np.ndarray, rank: int) -> Composed:
    """The best pair of at most `rank` for ΔW (d_out, d_in), by its SVD."""
    return _cut(*np.linalg.svd(change, full_matrices=False), rank)


def _cut(u: np.ndarray, s: np.ndarray, vt: np.ndarray, rank: int) -> Composed:
    squares = np.square(s, dtype=np.float64)
    b, a = (u[:, :rank] * s[:rank]).astype(np.float32), vt[:rank].astype(np.float32)
    return Composed(LoraPair(a, b), float(squares.sum()), float(squares[rank:].sum()))
