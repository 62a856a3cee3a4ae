"""Guesses at the next tokens from the conversation itself: what followed the last few tokens when they stood before.

Prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding). Whoever evaluates the guesses
keeps those that the model would have chosen: the answer does not change, it only comes sooner.
"""

from __future__ import annotations

from collections.abc import Iterable

SIZES = (3, 2)  # tokens that must have stood before in this order: the longest match guesses best


class Lookup:
    """One conversation's tokens and where each short run of them stood last. Each token costs the same to add."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """The conversation has gone on with these."""
        for token in tokens:
            for size in SIZES:
                if len(self._tokens) >= size:
                    self._after[tuple(self._tokens[-size:])] = len(self._tokens)
            self._tokens.append(token)

    def draft(self, n: int) -> list[int]:
        """Up to `n` tokens that may come next: those after the latest earlier place of the last tokens, if any."""
        for size in SIZES:
            place = self._after.get(tuple(self._tokens[-size:]))
            if place is not None:
                return self._tokens[place : place + n]
        return []
