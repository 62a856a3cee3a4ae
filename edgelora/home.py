"""Where the user's files live, and where a checkout keeps its examples.

`models_folder()` holds bases as they came; below it stand `adapters/` (those known by a name: runtime/store.py) and
`cache/` (what may be deleted at any time).
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from edgelora.errors import ConfigError

CHECKOUT = Path(__file__).resolve().parent.parent


def models_folder() -> Path:
    """$EDGELORA_HOME, else the checkout's `models/`, else where this platform keeps a program's data."""
    if named := os.environ.get("EDGELORA_HOME"):
        return Path(named).expanduser()
    if (CHECKOUT / "pyproject.toml").exists():
        return CHECKOUT / "models"
    return platformdirs.user_data_path("edgelora", appauthor=False)


def cache_folder() -> Path:
    """What was found out once and can be found out again: verdicts, snapshots."""
    return models_folder() / "cache"


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
