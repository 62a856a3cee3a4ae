"""Windows of tokens to measure a model on, from a text or from rows of data, and others that are held out from that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgelora.base.model import Base
from edgelora.data.calibration import general_sequences, task_sequences
from edgelora.errors import ConfigError, DataError

WINDOW = 256  # tokens; what is scored has at least CONTEXT of them before it
CONTEXT = 32
CALIBRATION, HELD_OUT, IMPORTANCE = 4, 8, 40  # windows
TOKENS = 1 << 15  # read at most, of rows drawn evenly from all, or from the beginning of a text
HELD_OUT_SHARE = 4  # the last quarter of the text or of the rows is held out
LOGITS = 1 << 24  # float32 kept of the original output: 64 MiB


@dataclass(frozen=True)
class Windows:
    """ids int64 (n, T), and the positions (P,) that are scored in each of them."""

    ids: np.ndarray
    scored: np.ndarray

    @property
    def n_scored(self) -> int:
        """Positions of all windows together."""
        return len(self.ids) * len(self.scored)


@dataclass(frozen=True)
class Calibration:
    """What sensitivities are measured on, what importance is collected on (more, of the same part), and the rest."""

    measured: Windows
    importance: np.ndarray
    held_out: Windows


def read_calibration(base: Base, data: Path | None, text: Path | None) -> Calibration:
    """Cut rows as the model's template renders them, or a plain text, into windows.

    Raises ConfigError without either, DataError for fewer tokens than one window for each purpose, and what reading
    raises.
    """
    ids = _ids(base, data, text)
    part = len(ids) - len(ids) // HELD_OUT_SHARE
    seen, rest = _cut(base, ids[:part]), _cut(base, ids[part:])
    if not len(seen) or not len(rest):
        raise DataError(
            what=f"{data or text}: {len(ids)} tokens are too few to measure on",
            why=f"windows of {WINDOW} tokens are measured, and the last quarter of the tokens is held out",
            fix=f"pass at least {HELD_OUT_SHARE * WINDOW} tokens of what the model will see",
        )
    measured = _spread(seen, CALIBRATION)
    n_scored = min(WINDOW - CONTEXT, max(8, LOGITS // base.config.vocab_size // len(measured)))
    return Calibration(
        Windows(measured, np.linspace(CONTEXT, WINDOW - 1, n_scored).astype(np.int64)),
        _spread(seen, IMPORTANCE),
        Windows(_spread(rest, HELD_OUT), np.arange(CONTEXT, WINDOW)),
    )


def _ids(base: Base, data: Path | None, text: Path | None) -> np.ndarray:
    if data is not None and text is None:
        return np.concatenate(task_sequences(data, base, WINDOW, TOKENS))
    if text is not None and data is None:
        return np.concatenate(general_sequences(text, base.tokenizer, WINDOW, TOKENS))
    raise ConfigError(
        what="nothing to measure on" if data is None else "--data and --text",
        why="sensitivities are measured on what the model will see: rows of data, or a text",
        fix="pass one of --data ROWS and --text FILE",
    )


def _cut(base: Base, ids: np.ndarray) -> np.ndarray:
    """Whole windows (n, T) one behind the other; each begins with BOS where the model wants one."""
    windows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW).copy()
    if base.tokenizer.add_bos:
        windows[:, 0] = base.tokenizer.bos_id
    return windows


def _spread(windows: np.ndarray, n: int) -> np.ndarray:
    """At most `n` of them, evenly spread from the first to the last."""
    picked: np.ndarray = windows[np.unique(np.linspace(0, len(windows) - 1, n).astype(int))]
    return picked
