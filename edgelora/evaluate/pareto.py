"""What nothing else beats: cells that no smaller or equally small one is at least as good as. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from edgelora.evaluate.cells import CellResult
from edgelora.evaluate.measures import kind_of

RANKED_BY = (("right", "loss"), ("kl",), ("perplexity",), ("bits_per_byte",))
"""Of these groups the first that was measured says what is best; the second of a group breaks its ties."""


def ranked_by(cells: Sequence[CellResult]) -> tuple[str, ...]:
    """The measures that rank these cells, the most telling first; empty where there is none."""
    for group in RANKED_BY:
        if found := tuple(key for key in group if any(cell.measure(key) for cell in cells)):
            return found
    return ()


def goodness(cell: CellResult, keys: Sequence[str]) -> tuple[float, ...]:
    """Higher is better, measure by measure; what was not measured is worse than anything."""
    return tuple(
        float("-inf") if (found := cell.measure(key)) is None else kind_of(key).better * found.value for key in keys
    )


def frontier(cells: Sequence[CellResult], key: str) -> list[CellResult]:
    """From the smallest to the largest, each better than all before it. What failed, is partial or is nothing to ship
    is never on it."""
    standing: list[CellResult] = []
    usable = [cell for cell in cells if cell.status == "ok" and cell.ships and cell.measure(key)]
    for cell in sorted(usable, key=lambda cell: (cell.size_bytes, -goodness(cell, [key])[0])):
        if not standing or goodness(cell, [key]) > goodness(standing[-1], [key]):
            standing.append(cell)
    return standing
