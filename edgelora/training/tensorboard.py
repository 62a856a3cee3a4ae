"""The metrics of a run as TensorBoard's event files, for who has TensorBoard open anyway (extra `tensorboard`)."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType

from edgelora.errors import ConfigError, OutputError
from edgelora.training.metrics import Metrics

TAGS = {
    "loss": "loss/train",
    "held_out_loss": "loss/held-out",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "tokens_per_s": "speed/tokens_per_s",
    "peak_bytes": "memory/peak_bytes",
}


class TensorBoardLog:
    """Event files in `folder`, for a run that goes on behind step `after` (None: for a new run); a context.

    TensorBoard hides what an earlier process wrote of later steps. Made, it has written nothing yet, and has raised
    ConfigError if tensorboard is not installed. Raises OutputError if the disk refuses, which may be told some steps
    later: tensorboard writes in a thread of its own.
    """

    def __init__(self, folder: Path, after: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise ConfigError(
                what="--tensorboard: the package tensorboard is not installed",
                why="edgelora writes its event files with it, and does not need it for anything else",
                fix="pip install 'edgelora[tensorboard]', or leave --tensorboard out: curve.png shows the same",
            ) from e
        self._folder = folder
        self._open = partial(SummaryWriter, str(folder), purge_step=None if after is None else after + 1)

    def append(self, metrics: Metrics) -> None:
        """Write what was measured; an answer to a prompt as text."""
        measured = [(tag, getattr(metrics, name)) for name, tag in TAGS.items()]
        measured += metrics.numbers.items()
        measured += [(f"{name}/held-out", value) for name, value in metrics.held_out_numbers.items()]
        with self._written():
            for tag, value in measured:
                if value is not None and math.isfinite(value):
                    self._writer.add_scalar(tag, value, metrics.step)
            for sample in metrics.samples:
                self._writer.add_text(f"sample/{sample.prompt}", sample.text, metrics.step)

    def __enter__(self) -> TensorBoardLog:
        with self._written():
            self._writer = self._open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        on_its_way = error or sys.exc_info()[1]  # who closes a stack of contexts does not say what ended them
        try:
            with self._written():
                self._writer.close()
        except OutputError:
            if on_its_way is None:
                raise

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise OutputError(
                what=f"{self._folder}: could not be written ({e.strerror or e})",
                why="the disk refused; the checkpoints that stand are untouched",
                fix="free some space, then run the command again with --resume",
            ) from e
