"""Changes of a whole weight, or of a bias, that are said through what they change, in numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from edgelora.peft.change import Chosen, LoraPair


class OfWeight(Protocol):
    """What makes ΔW of W, and can be cut to some rows of both."""

    def __getitem__(self, rows: Chosen) -> OfWeight: ...

    def of(self, weight: np.ndarray) -> np.ndarray:
        """ΔW (d_out, d_in) float32 of this W, in memory of its own."""
        ...


@dataclass(frozen=True)
class InPlaceOf:
    """ΔW = V − W: V (d_out, d_in), or of a bias (d_out,), stands there whatever was there before."""

    values: np.ndarray

    def __getitem__(self, rows: Chosen) -> InPlaceOf:
        return InPlaceOf(self.values[rows])

    def of(self, weight: np.ndarray) -> np.ndarray:
        change: np.ndarray = self.values - weight
        return change


@dataclass(frozen=True)
class WhereNotZero:
    """ΔW = b a where W is not zero. Where it is, ΔW is −0, the one number that leaves 0 and −0 as they are."""

    pair: LoraPair

    def __getitem__(self, rows: Chosen) -> WhereNotZero:
        return WhereNotZero(self.pair.of(rows))

    def of(self, weight: np.ndarray) -> np.ndarray:
        return np.where(weight == 0, np.float32(-0.0), self.pair.b @ self.pair.a)


@dataclass(frozen=True)
class TimesAndPlus:
    """ΔW = W ∘ (times.b times.a) + plus.b plus.a."""

    times: LoraPair
    plus: LoraPair

    def __getitem__(self, rows: Chosen) -> TimesAndPlus:
        return TimesAndPlus(self.times.of(rows), self.plus.of(rows))

    def of(self, weight: np.ndarray) -> np.ndarray:
        change: np.ndarray = self.times.b @ self.times.a
        change *= weight
        change += self.plus.b @ self.plus.a
        return change
