"""The logits of final hidden states, from where the head's rows are stored. Imports no torch."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from edgelora.architectures.names import EMBEDDING, HEAD
from edgelora.base import ggml
from edgelora.base.model import Base

NewRows: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Ids (k,) of tokens, and their rows, float32 (k, d)."""

VOCABULARY_ROWS = 8192  # rows of the head that are floats at once


class Head:
    """The last matrix of a model, tied or its own, with new rows for some tokens where there are any."""

    def __init__(self, base: Base, new: NewRows | None = None) -> None:
        self._tensors, self._softcap = base.tensors, base.config.final_logit_softcapping
        self._new = new
        self._name = f"{EMBEDDING if base.config.tie_word_embeddings else HEAD}.weight"

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """Hidden states float32 (n, d) as a decoder gives them → logits float32 (n, V), bent as Gemma 2's are."""
        rows, kind, columns = self._tensors.matrix(self._name)
        out = np.empty((len(hidden), len(rows)), np.float32)
        for first in range(0, len(rows), VOCABULARY_ROWS):
            part = slice(first, first + VOCABULARY_ROWS)
            np.matmul(hidden, ggml.dequantize(rows[part], kind, columns).T, out=out[:, part])
        self._tensors.forget(self._name)
        if self._new is not None:
            ids, own = self._new
            out[:, ids] = hidden @ own.T
        if self._softcap is not None:
            out /= self._softcap
            np.tanh(out, out=out)
            out *= self._softcap
        return out
