"""Sums of squares of what goes into a model's products, by GGUF tensor name. Knows no engine and imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from edgelora.errors import BaseModelError


@dataclass
class ActivationSums:
    """float64 (n_matrices, columns) and int64 (n_matrices,): squares, and how many tokens were summed.

    matrices: the tensors to watch, with 1 or how many experts are stacked in each. One that no token reaches has no
    entry in the sums.
    """

    matrices: Mapping[str, int]
    sums: dict[str, np.ndarray] = field(default_factory=dict)
    counts: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, tensor: str, squares: np.ndarray, tokens: int, matrix: int = 0) -> None:
        """Count `tokens` more whose squares sum to `squares` (columns,). Raises BaseModelError if they are no numbers.

        An expert may get no token: that says that its tensor is used.
        """
        if not np.isfinite(squares).all():
            raise BaseModelError(
                what=f"{tensor}: what the model multiplies it with is not a number",
                why="a weight of the model or the adapter is damaged, or a product is too large for the numbers used",
                fix="look at the file with `edgelora inspect`, or download or train it again",
            )
        if tensor not in self.sums:
            self.sums[tensor] = np.zeros((self.matrices[tensor], len(squares)))
            self.counts[tensor] = np.zeros(self.matrices[tensor], np.int64)
        self.sums[tensor][matrix] += squares
        self.counts[tensor][matrix] += tokens
