"""Where the user's files live, and where a checkout keeps its examples."""

from __future__ import annotations

import os
from pathlib import Path

from edgelora.errors import ConfigError

CHECKOUT = Path(__file__).resolve().parent.parent


def models_folder() -> Path:
    """$EDGELORA_HOME, else the checkout's `models/`, else a folder of the user's own."""
    if named := os.environ.get("EDGELORA_HOME"):
        return Path(named).expanduser()
    if (CHECKOUT / "pyproject.toml").exists():
        return CHECKOUT / "models"
    return Path.home() / ".local" / "share" / "edgelora"


def example(name: str) -> Path:
    """A folder of `examples/`. Raises ConfigError outside a checkout."""
    folder = CHECKOUT / "examples" / name
    if not folder.is_dir():
        raise ConfigError(
            what=f"examples/{name} was not found",
            why="the examples come with the repository, not with an installed package",
            fix="clone the repository and run `make quickstart` in it",
        )
    return folder
