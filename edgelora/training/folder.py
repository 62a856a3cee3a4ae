"""The folder of a run, beside the adapter that it makes: `adapters/mine` and `adapters/mine.run/`.

It holds `run.json`, `metrics.jsonl`, `curve.png`, `checkpoints/` and the lock of the process that works in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from edgelora.config import TrainConfig
from edgelora.errors import OutputError
from edgelora.files.atomic import remove, sweep, write_text
from edgelora.files.lock import locked

MADE_BY_A_RUN = ("run.json", "metrics.jsonl", "curve.png", "checkpoints", "tensorboard")


class RunFolder:
    """Paths in it, and who may work there."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(f"{out.name}.run")
        self.checkpoints, self.metrics = self.path / "checkpoints", self.path / "metrics.jsonl"
        self.curve, self.facts, self.tensorboard = (
            self.path / "curve.png", self.path / "run.json", self.path / "tensorboard",
        )  # fmt: skip
        self._is_held = False

    @property
    def is_begun(self) -> bool:
        """Whether a checkpoint stands here."""
        return self.checkpoints.is_dir() and any(self.checkpoints.glob("step-*"))

    @property
    def newest_step(self) -> int | None:
        """That of the last checkpoint, or None if there is none. Reads names alone."""
        return max((int(path.name.split("-")[1]) for path in self.checkpoints.glob("step-*")), default=None)

    def is_of(self, config: TrainConfig) -> bool:
        """Whether run.json says that what stands here is what `config` asks for."""
        try:
            facts = json.loads(self.facts.read_bytes())
        except (OSError, ValueError):
            return False
        return isinstance(facts, dict) and facts.get("asked") == config.model_dump(mode="json")

    @property
    def checkpoint_bytes(self) -> int:
        """What the checkpoints that stand here take of the disk."""
        return sum(file.stat().st_size for file in self.checkpoints.rglob("*") if file.is_file())

    @contextmanager
    def held_if_there(self) -> Iterator[None]:
        """Alone in the folder, if there is one: a checkpoint is read while nobody writes the next. Makes nothing."""
        if not self.path.is_dir():
            yield
            return
        with locked(self.path / "lock"):
            self._is_held = True
            yield

    @contextmanager
    def held(self) -> Iterator[None]:
        """Alone in the folder, with what killed processes left swept away.

        Raises OutputError if another run began there since `held_if_there` found none.
        """
        with nullcontext() if self._is_held else locked(self.path / "lock"):
            if self.is_begun and not self._is_held:
                raise OutputError(
                    what=f"{self.path}: another run was begun here while this one read its rows",
                    why="both would keep their checkpoints there",
                    fix="choose another --out, or pass --resume to go on with that run",
                )
            sweep(self.path)
            sweep(self.checkpoints)
            sweep(self.out.absolute().parent, self.out.name)
            yield

    def empty(self) -> None:
        """Remove what an earlier run left: behind all that can be refused, for there is no way back."""
        for path in (self.path / name for name in MADE_BY_A_RUN):
            try:
                remove(path)
            except FileNotFoundError:
                pass
            except OSError as e:
                raise OutputError(
                    what=f"{path}: could not be removed ({e.strerror})",
                    why="a new run begins in an empty folder",
                    fix="remove it yourself, or choose another --out",
                ) from e

    def refuse_a_run(self, config: TrainConfig) -> None:
        """Raise OutputError if a run was begun here and nobody said what shall become of it."""
        if self.is_begun and not (config.resume or config.overwrite or self.out.exists()):
            raise OutputError(
                what=f"{self.path}: the checkpoints of a run stand here",
                why="a new one would overwrite its checkpoints",
                fix="pass --resume to go on with that run, or --overwrite to start anew",
            )

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        """Replace run.json in one step."""
        write_text(self.facts, json.dumps(facts, indent=2, ensure_ascii=False) + "\n", overwrite=True)
