"""How adapters over one base meet, layer by layer: alike or against each other, and foreign to the base's own weights.

Imports no torch. A cosine comes from the factors alone; sign conflicts and intruders take one ΔW at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from converters.compose import Part
from edgelora.base.model import Base
from edgelora.peft.adapter import LoraPair

LEADING = 10  # singular vectors of W + ΔW that are looked at (arXiv:2410.21228, section 4)
FOREIGN = 0.6  # below this cosine to all of W's a singular vector is an intruder
VANISHING = 1e-6  # a singular value so much smaller than the first has no vector that could be told
ROWS = 256  # of a ΔW at a time


@dataclass(frozen=True)
class Meeting:
    """Two adapters in one layer, at the weight 1."""

    a: str
    b: str
    cosine: float
    """Of ΔW_a and ΔW_b as vectors: 1 where they say the same, 0 where nothing of them meets, -1 the contrary."""
    conflict: float
    """The share of entries with opposite signs, of those that both change: half for adapters that are unrelated."""


@dataclass(frozen=True)
class LayerInterference:
    """What meets in one linear layer. `intruders`: how many of the LEADING singular vectors of W + ΔW are foreign to
    W, for each adapter at its weight and for their composition."""

    module: str
    meetings: tuple[Meeting, ...]
    intruders: Mapping[str, int]

    def as_dict(self) -> dict[str, Any]:
        return {
            "module": self.module,
            "meetings": [vars(meeting) for meeting in self.meetings],
            "intruders": dict(self.intruders),
        }


def interference(parts: Sequence[Part], composed: Part, base: Base) -> Iterator[LayerInterference]:
    """Of every layer that any of `parts` changes. The SVD of each weight is what takes the time."""
    for module in (*base.linears, *base.vocabularies):
        pairs = {part.name: part.adapter.pair(module) for part in parts if module in part.adapter.tensors}
        if not pairs:
            continue
        weights = {part.name: part.weight for part in parts}
        weight = base.tensors.matrix(f"{module}.weight").floats()
        own = left_vectors(weight)
        changed = {name: (pair, weights[name]) for name, pair in pairs.items()}
        changed[composed.name] = (composed.adapter.pair(module), composed.weight)
        found = {name: intruders(weight + np.float32(w) * (p.b @ p.a), own) for name, (p, w) in changed.items()}
        base.tensors.forget(f"{module}.weight")
        yield LayerInterference(module, tuple(meeting(a, b, pairs) for a, b in combinations(pairs, 2)), found)


def meeting(a: str, b: str, pairs: Mapping[str, LoraPair]) -> Meeting:
    """How the adapters of these names meet."""
    return Meeting(a, b, cosine(pairs[a], pairs[b]), conflict(pairs[a], pairs[b]))


def cosine(one: LoraPair, two: LoraPair) -> float:
    """⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖); 0 where one of them is zero."""
    lengths = (_product(one, one) * _product(two, two)) ** 0.5
    return _product(one, two) / lengths if lengths else 0.0


def _product(one: LoraPair, two: LoraPair) -> float:
    """tr(ΔW₁ᵀ ΔW₂) = Σ (B₁ᵀB₂) ∘ (A₁A₂ᵀ), of (r₁, r₂) matrices."""
    b, a = one.b.T.astype(np.float64) @ two.b, one.a.astype(np.float64) @ two.a.T
    return max(float(np.sum(b * a)), 0.0) if one is two else float(np.sum(b * a))


def conflict(one: LoraPair, two: LoraPair) -> float:
    """The share of entries that ΔW₁ and ΔW₂ move in opposite directions, of those that both move; a few rows at a
    time."""
    opposite = both = 0
    for first in range(0, len(one.b), ROWS):
        rows = slice(first, first + ROWS)
        signs = np.sign(one.b[rows] @ one.a) * np.sign(two.b[rows] @ two.a)
        opposite += int(np.count_nonzero(signs < 0))
        both += int(np.count_nonzero(signs))
    return opposite / both if both else 0.0


def intruders(changed: np.ndarray, own: np.ndarray) -> int:
    """How many of the LEADING left singular vectors of W + ΔW have a cosine below FOREIGN to every one in `own`,
    those of W (arXiv:2410.21228, algorithm 1)."""
    cosines = np.abs(own.T @ left_vectors(changed, LEADING))
    return int(np.count_nonzero(cosines.max(axis=0) < FOREIGN))


def left_vectors(weight: np.ndarray, n: int | None = None) -> np.ndarray:
    """The left singular vectors (d_out, k), float64, the strongest first: `n` of them, or all that can be told.

    By the eigenvectors of the smaller Gram matrix, several times faster than an SVD.
    """
    w = weight.astype(np.float64)
    tall = w.shape[0] > w.shape[1]
    squares, vectors = np.linalg.eigh(w.T @ w if tall else w @ w.T)
    values = np.sqrt(np.maximum(squares[::-1], 0.0))[:n]
    told = values > VANISHING * values[0]
    vectors, values = vectors[:, ::-1][:, :n][:, told], values[told]
    return (w @ vectors) / values if tall else vectors
