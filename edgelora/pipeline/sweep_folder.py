"""The folder of a sweep, beside the adapter that it makes: its trials and sweep.json; and going on with them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from edgelora.config import TrainConfig
from edgelora.errors import ConfigError, FileFormatError, OutputError
from edgelora.files.atomic import remove, sweep, write_text
from edgelora.files.checkpoint import read_json
from edgelora.files.lock import locked
from edgelora.training.sweep import Result

# what may be said otherwise when a sweep goes on; that files are the same is seen by their digests
FREE = {"base", "original", "data", "valid", "out", "resume", "overwrite"}


class Record(BaseModel):
    """sweep.json: what was asked, and what came of it so far."""

    asked: dict[str, Any]
    trials: list[str]
    digests: dict[str, str] = {}
    results: dict[str, Result] = {}
    ranking: list[dict[str, Any]] = []

    def with_wishes(self, config: TrainConfig) -> TrainConfig:
        """What was asked, with what `config` may say otherwise. Raises ConfigError for the rest."""
        asked, said = TrainConfig.model_validate(self.asked), config.model_fields_set - FREE
        other = [
            f"{name} is {getattr(config, name)!r}, was {getattr(asked, name)!r}"
            for name in TrainConfig.model_fields
            if name in said and getattr(config, name) != getattr(asked, name)
        ]
        if other:
            raise _another("; ".join(other))
        return asked.model_copy(update={name: getattr(config, name) for name in config.model_fields_set & FREE})

    def require_trials(self, names: list[str]) -> None:
        """Raise ConfigError unless these are the trials."""
        if names != self.trials:
            raise _another(f"its trials were {' '.join(self.trials)}")

    def require_same(self, digests: dict[str, str]) -> None:
        """Raise ConfigError if a trial ran over another base or other rows than those before it."""
        other = [name for name in digests if self.digests and self.digests.get(name) != digests[name]]
        if other:
            raise _another("; ".join(f"the {name} changed" for name in other))
        self.digests = digests


class SweepFolder:
    """Paths in it, and who may work there."""

    def __init__(self, out: Path) -> None:
        self.path = out.with_name(f"{out.name}.sweep")
        self.record, self.picture, self._lock = (self.path / name for name in ("sweep.json", "sweep.png", "lock"))

    @contextmanager
    def held(self, *, anew: bool) -> Iterator[None]:
        """Alone in the folder, with what killed processes left swept away; empty, if a sweep begins."""
        with locked(self._lock):
            sweep(self.path)
            for path in self._entries() if anew else []:
                remove(path)
            yield

    def earlier(self, config: TrainConfig) -> Record | None:
        """The sweep to go on with.

        Raises OutputError if one stands here, or something else, and nobody said what shall become of it.
        """
        if not self._entries():
            return None
        if not self.record.exists():
            raise OutputError(
                what=f"{self.path}: this folder is no sweep's",
                why=f"a sweep keeps its trials there and nothing else, and there is no {self.record.name}",
                fix="move it away, or choose another --out",
            )
        if not config.resume and not config.overwrite:
            raise OutputError(
                what=f"{self.path}: a sweep was begun here",
                why="a new one would remove its trials",
                fix="pass --resume to go on with it, or --overwrite to start anew",
            )
        return self._read() if config.resume else None

    def write(self, record: Record) -> None:
        """Replace the record in one step."""
        text = json.dumps(record.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False)
        write_text(self.record, text + "\n", overwrite=True)

    def _read(self) -> Record:
        try:
            return Record.model_validate(read_json(self.record))
        except (ValidationError, FileFormatError) as e:
            raise FileFormatError(
                what=f"{self.record}: it does not say what the sweep came to",
                why="it was edited, or another version of edgelora wrote it",
                fix="start anew with --overwrite",
            ) from e

    def _entries(self) -> list[Path]:
        return sorted(path for path in self.path.iterdir() if path != self._lock) if self.path.is_dir() else []


def _another(differences: str) -> ConfigError:
    return ConfigError(
        what=f"this is not the sweep that was begun: {differences}",
        why="trials over other rows or with other settings cannot be compared",
        fix="leave them as they were, or start anew with --overwrite",
    )
