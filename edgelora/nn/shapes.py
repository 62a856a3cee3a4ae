"""The shapes of packed rows that passes are recorded for (`graphs.py`): few, and each row is little longer in its own.

What stands behind the end of a row is a segment of its own, to which no other looks and from which no gradient comes.
"""

from __future__ import annotations

from typing import NamedTuple

from edgelora.nn.gpu_attention import Places

SIZES = 16  # of rows: each becomes longer by less than a sixteenth of the longest, or an eighth


class Shape(NamedTuple):
    """So many tokens, keys (where segments share a beginning, else 0) and segments, none of these longer than
    `longest`; and whether the embeddings have a gradient."""

    tokens: int
    keys: int
    segments: int
    longest: int
    learns: bool

    @classmethod
    def of(cls, row: Places, learns: bool, step: int) -> Shape:
        """The smallest that this row fits into. Tokens are a multiple of `step` (`step_of`).

        Too many of the others cost little, programs that end as they begin: so they are coarse.
        """
        n_queries, n_keys = row.queries[-1], row.keys[-1]
        # behind a shared beginning something must stand: a segment without a query has no gradient to write
        tokens = multiple(n_queries if row.rows is None else n_queries + 1, step)
        keys = 0 if row.rows is None else multiple(n_keys + tokens - n_queries, 4 * step)
        rest = max(tokens - n_queries, keys - n_keys)
        segments = len(row.queries) - 1 + (rest > 0)
        longest = max(row.longest_query, row.longest_key, rest)
        return cls(tokens, keys, _power_of_four(segments), min(_power_of_four(longest), max(tokens, keys)), learns)

    def padded(self, row: Places) -> Places:
        """The row with what stands behind it."""
        more = self.segments + 1 - len(row.queries)
        queries = row.queries + [self.tokens] * more
        if row.rows is None:
            return Places(queries, queries, self.longest, self.longest, None)
        rows = row.rows + [0] * (self.keys - len(row.rows))
        return Places(queries, row.keys + [self.keys] * more, self.longest, self.longest, rows)


def step_of(longest_row: int) -> int:
    """The sizes of rows are multiples of this, where they have about so many tokens at most."""
    return max(16, (1 << (longest_row - 1).bit_length()) // SIZES)


def multiple(n: int, step: int) -> int:
    """The first multiple of `step` that is no less than n."""
    return -(-n // step) * step


def _power_of_four(n: int) -> int:
    return 1 << -(-(n - 1).bit_length() // 2) * 2
