"""What an adapter makes of one linear layer, in numpy: the one thing that merging, exporting and attaching ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from edgelora.peft.of_input import OfInput
from edgelora.peft.of_weight import InPlaceOf, OfWeight

SHORTEST = 1e-30  # DoRA: a row of zeros, as padding a model leaves them, has a length to divide by and stays zero

Chosen: TypeAlias = "slice | np.ndarray"
"""Some rows in their order, or all of them in another one."""


@dataclass(frozen=True)
class LoraPair:
    """`a` (r, d_in) and `b` (d_out, r) float32 with every scale already in `b`: ΔW = b @ a.

    A DoRA has a `magnitude` (d_out,) float32 too: the rows of W + b @ a are brought to these lengths.
    """

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return len(self.a)

    @property
    def is_nothing(self) -> bool:
        """Whether b @ a is zero because each rank has a column of b or a row of a that is."""
        return not (self.b.any(0) & self.a.any(1)).any()

    def of(self, rows: Chosen) -> LoraPair:
        """The same of these rows of W."""
        return LoraPair(self.a, self.b[rows], None if self.magnitude is None else self.magnitude[rows])

    def change(self, weight: np.ndarray) -> np.ndarray:
        """ΔW (d_out, d_in) float32: what makes of this `weight` the adapted one."""
        change: np.ndarray = self.b @ self.a
        if self.magnitude is not None:
            change += weight
            change *= self._factors(change)[:, None]
            change -= weight
        return change

    def factors(self, weight: np.ndarray) -> np.ndarray:
        """By what each row of W + b @ a is multiplied (d_out,), float32."""
        return np.ones(len(self.b), np.float32) if self.magnitude is None else self._factors(weight + self.b @ self.a)

    def _factors(self, turned: np.ndarray) -> np.ndarray:
        assert self.magnitude is not None
        lengths = np.sqrt(np.einsum("ij,ij->i", turned, turned))
        factors: np.ndarray = self.magnitude / np.maximum(lengths, SHORTEST)
        return factors


@dataclass(frozen=True)
class Change:
    """y = W x + c becomes y = W' x + c', all float32, None for what is not there:

        W' = diag(rows) (P(W) + whole) diag(columns)        c' = rows ∘ c + bias

    P(W) = W + b a is the pair's, its rows brought to their lengths where it has them. rows, bias (d_out,);
    columns (d_in,); whole (d_out, d_in), or what makes one of W. Everything of it that has a row for each row of W can
    be cut or permuted. A bias that stands in the place of c is an `InPlaceOf`. What hangs on x in another way than
    this, `of_input`, stands alone, and is computed in torch.
    """

    pair: LoraPair | None = None
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None
    whole: np.ndarray | OfWeight | None = None
    bias: np.ndarray | InPlaceOf | None = None
    of_input: OfInput | None = None

    @property
    def is_pair(self) -> bool:
        """Whether it is b a and nothing else: what llama.cpp can add to W x."""
        others = (self.rows, self.columns, self.whole, self.bias, self.of_input)
        return self.pair is not None and self.pair.magnitude is None and all(part is None for part in others)

    def of(self, rows: Chosen) -> Change:
        """The same of these rows of W and c."""
        assert self.of_input is None
        pair = None if self.pair is None else self.pair.of(rows)
        factors = None if self.rows is None else self.rows[rows]
        whole = None if self.whole is None else self.whole[rows]
        bias = None if self.bias is None else self.bias[rows]
        return Change(pair, factors, self.columns, whole, bias)

    def change(self, weight: np.ndarray) -> np.ndarray:
        """ΔW float32 of the shape of `weight` (d_out, d_in), which stays as it is."""
        change = self._added(weight)
        if self.rows is None and self.columns is None:
            return change
        change += weight
        if self.rows is not None:
            change *= self.rows[:, None]
        if self.columns is not None:
            change *= self.columns
        change -= weight
        return change

    def _added(self, weight: np.ndarray) -> np.ndarray:
        """P(W) + whole − W, in memory of its own."""
        if self.whole is None:
            return np.zeros_like(weight) if self.pair is None else self.pair.change(weight)
        whole = self.whole.copy() if isinstance(self.whole, np.ndarray) else self.whole.of(weight)
        if self.pair is not None:
            whole += self.pair.change(weight)
        return whole

    def change_of_bias(self, bias: np.ndarray) -> np.ndarray:
        """c' − c (d_out,) float32 of this c."""
        if isinstance(self.bias, InPlaceOf):
            return self.bias.of(bias)
        change = np.zeros_like(bias) if self.rows is None else bias * self.rows - bias
        return change if self.bias is None else change + self.bias
