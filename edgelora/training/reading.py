"""How far the reading of rows is, told while they go by to whoever listens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgelora.data.sources import count_rows
from edgelora.progress import OnProgress, Pace, Progress, silent

TELL_EVERY = 200  # rows


class Reading:
    """Rows of files and folders: `add` as each is encoded. Nothing is told of a pipe, whose end nobody knows.

    The rows are counted beforehand, which takes a hundredth of the time that encoding them takes. Raises DataError for
    a file that is unreadable.
    """

    def __init__(self, stage: str, paths: Sequence[Path], on_progress: OnProgress) -> None:
        self._stage, self._on_progress, self._added = stage, on_progress, 0
        counts = [None] if on_progress is silent else [count_rows(path) for path in paths]
        self._pace = None if None in counts else Pace(sum(n for n in counts if n is not None))

    def add(self) -> None:
        """One more row."""
        self._added += 1
        if self._pace is not None and self._added % TELL_EVERY == 0:
            _, left_s = self._pace.step(0, TELL_EVERY)
            total = max(self._added, self._pace.total)  # a file may grow while it is read
            self._on_progress(Progress(self._stage, self._added, total, eta_s=max(0.0, left_s)))
