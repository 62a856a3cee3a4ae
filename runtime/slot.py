"""One of the questions that are answered side by side: where it stands, and what of it is evaluated next."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edgelora.evaluate.protocols import Question
from runtime.binding import Entry


class Slot:
    """One question in work: its prompt, then its answer token by token, then its reference in one piece."""

    def __init__(self, number: int, question: Question, shared: int) -> None:
        self.number, self.question = number, question
        self.tokens: list[int] = []
        self.nll: list[float] = []
        self.rewind = self.finished = self._scoring = False
        self.due, self._position = list(question.prompt[shared:]), shared

    @property
    def n_wanted(self) -> int:
        return len(self.due) if self._scoring else 1

    def entries(self, sequence: int) -> list[Entry]:
        """What the next decode must evaluate: all rows are wanted of a reference, else only the last."""
        last = len(self.due) - 1
        return [
            Entry(token, self._position + i, sequence, self._scoring or i == last) for i, token in enumerate(self.due)
        ]

    def advance(self, rows: Sequence[np.ndarray], max_tokens: int, ends: Callable[[int], bool]) -> None:
        """Take in the logits of the wanted entries and decide what is due next."""
        reference = self.question.reference
        self._position += len(self.due)
        self.rewind = False
        if self._scoring:
            self.nll += [_nll(z, label) for z, label in zip(rows, reference[1:], strict=True)]
            self.finished = True
            return
        if not self.nll and reference:
            self.nll.append(_nll(rows[0], reference[0]))
        token = int(rows[0].argmax())
        if not ends(token):
            self.tokens.append(token)
        if ends(token) or len(self.tokens) >= max_tokens:
            self._scoring, self.finished = True, len(reference) < 2
            self.rewind, self.due, self._position = True, list(reference[:-1]), len(self.question.prompt)
        else:
            self.due = [token]


def _nll(z: np.ndarray, label: int) -> float:
    top = z.max()
    return float(np.log(np.exp(z - top).sum()) + top - z[label])
