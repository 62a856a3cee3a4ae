"""SentencePiece's BPE as llama.cpp does it (`llama` in GGUF's words): merges by score, no normalizing. Plain text only.

It is not the sentencepiece library, which normalizes, nor the `tokenizers` package, whose merges have no equal ranks.
"""

from __future__ import annotations

import re
from functools import lru_cache
from heapq import heappop, heappush
from itertools import pairwise

from edgelora.data.vocabulary import BYTE_TOKENS, Vocabulary

SPACE = "▁"


class SentencePieceBPE:
    """Text → ids: of all neighbours that make a token, those of the highest score merge first, the leftmost of equals.

    A character that is no token becomes those of its bytes.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._ids = {token: i for i, token in enumerate(vocabulary.tokens)}
        self._scores = vocabulary.scores
        self._bytes = [self._ids[token] for token in BYTE_TOKENS]
        # A text may be cut where no token could ever reach across. That is before most spaces, and words repeat.
        before = {a for token in self._ids for a, b in pairwise(token) if b == SPACE}
        inside = re.escape("".join(sorted(before | {SPACE})))
        self._cuts = re.compile(f"(?<=[^{inside}])(?={SPACE})")
        self._merged = lru_cache(maxsize=1 << 16)(self._merge)

    def encode(self, text: str, *, space_prefix: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids, and for each the (first, last + 1) characters it came from; a space put in front belongs to the
        first."""
        ids, offsets = list[int](), list[tuple[int, int]]()
        shift = -1 if space_prefix else 0
        for word in self._cuts.split((SPACE if space_prefix else "") + text.replace(" ", SPACE)):
            for token, first, last in self._merged(word):
                ids.append(token)
                offsets.append((max(first + shift, 0), max(last + shift, 1)))
            shift += len(word)
        return ids, offsets

    def _merge(self, word: str) -> list[tuple[int, int, int]]:
        n = len(word)
        ends = list(range(1, n + 1))  # a symbol begins at its own index; 0: it was merged into the one before
        before, after = list(range(-1, n - 1)), [*range(1, n), -1]
        ids, scores = self._ids, self._scores
        queue: list[tuple[float, int, int, int]] = []

        def consider(left: int, right: int) -> None:
            if left >= 0 and right >= 0 and (token := ids.get(word[left : ends[right]])) is not None:
                heappush(queue, (-scores[token], left, right, ends[right]))

        for i in range(1, n):
            consider(i - 1, i)
        while queue:
            _, left, right, end = heappop(queue)
            if ends[left] != right or ends[right] != end:
                continue  # one of the two has merged with another since
            ends[left], ends[right] = end, 0
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            consider(before[left], left)
            consider(left, after[left])

        found = []
        i = 0
        while 0 <= i < n:
            token = ids.get(word[i : ends[i]])
            spelled = [self._bytes[b] for b in word[i].encode()] if token is None else [token]
            found += [(t, i, ends[i]) for t in spelled]
            i = after[i]
        return found
