"""Rows of the example commands, and configs of runs that differ by a few settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import ROOT

from edgelora.config import TrainConfig


def example_rows(path: Path, first: int, last: int) -> Path:
    """The rows from `first` to before `last`, written to `path`."""
    lines = (ROOT / "examples" / "home" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[first:last]), encoding="utf-8")
    return path


def configs(**settings: Any) -> Callable[..., TrainConfig]:
    """`make(out, **changes)`: the config with these settings, but for the changes."""
    return lambda out, **changes: TrainConfig(**{**settings, "out": out, **changes})
