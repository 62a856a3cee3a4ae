"""Going on with a run: its last checkpoint, and that it is the same run that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from edgelora.config import TrainConfig
from edgelora.device import Choice
from edgelora.errors import ConfigError, FileFormatError
from edgelora.training.checkpoint import Snapshot, read_latest
from edgelora.training.folder import RunFolder

# what may be said otherwise when a run goes on: it changes no number, or the last bits of a card's
FREE = {"out", "resume", "overwrite", "keep_adapter", "save_every", "keep_checkpoints", "tensorboard", "shard_base",
        "cuda_graphs"}  # fmt: skip
# these too, where they lead to the same files: their digests are compared instead
PATHS = {"base", "data", "valid", "original", "orthogonal_to", "chat_template"}
ALONE = {"processes": "1"}  # where no choice says how many


class Earlier:
    """A run that was begun: what was asked of it, what was chosen for it, and where it stands."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        try:
            self.asked = TrainConfig.model_validate(snapshot.facts["asked"])
            self.settled = TrainConfig.model_validate(snapshot.facts["settled"])
            self.choices: dict[str, dict[str, str]] = dict(snapshot.facts["choices"])
            self.digests: dict[str, str] = dict(snapshot.facts["digests"])
            self.versions: dict[str, str] = dict(snapshot.facts["versions"])
            self.changed: list[str] = list(snapshot.facts.get("changed", []))
        except (KeyError, TypeError, ValueError, ValidationError) as e:
            raise FileFormatError(
                what=f"the checkpoint of step {snapshot.step} does not say what run it belongs to",
                why=f"another version of edgelora wrote it ({type(e).__name__})",
                fix="start anew with --overwrite",
            ) from e

    def with_wishes(self, config: TrainConfig) -> TrainConfig:
        """What was asked of the earlier run, with what `config` may say otherwise. Raises ConfigError for the rest."""
        said = {name: getattr(config, name) for name in config.model_fields_set - FREE - PATHS}
        known = {name: (getattr(self.asked, name), getattr(self.settled, name)) for name in said}
        other = [f"{name} is {v!r}, was {known[name][1]!r}" for name, v in said.items() if v not in known[name]]
        if [source.weight for source in config.data] != [source.weight for source in self.asked.data]:
            other.append(f"data is {_listed(config)}, was {_listed(self.asked)}")
        if other:
            raise _another("; ".join(other))
        wishes = {name: getattr(config, name) for name in config.model_fields_set & (FREE | PATHS)}
        return self.asked.model_copy(update=wishes)

    def differences(self, here: Mapping[str, Choice], versions: Mapping[str, str]) -> list[str]:
        """What now computes otherwise than it did: `here`, of this machine, and the packages. In words, for a note.

        What the earlier run did not write down is not compared.
        """
        before = ALONE | {name: choice["value"] for name, choice in self.choices.items()}
        now = ALONE | {name: choice.value for name, choice in here.items()}
        return [
            *(f"{other}: the same but for rounding" for other in _others(before, now)),
            *(
                f"{other}: the same but for rounding, unless it computes something else now"
                for other in _others(self.versions, versions)
            ),
        ]

    def changed_until_now(self, differences: Sequence[str]) -> list[str]:
        """What changed whenever the run went on, for run.json."""
        return [*self.changed, *(f"behind step {self.snapshot.step}: {one}" for one in differences)]

    def require_same(self, digests: dict[str, str]) -> None:
        """Raise ConfigError if the base, its original or template, the rows or those held out are others."""
        other = [name for name, digest in digests.items() if self.digests.get(name) != digest]
        if other:
            raise _another("; ".join(f"the {name} changed" for name in other))


def earlier_run(folder: RunFolder, on_note: Callable[[str], None]) -> Earlier | None:
    """The run in `folder` at its last whole checkpoint, None if it has none. `on_note` hears of damaged ones.

    Raises FileFormatError where all of them are: what would begin then is another run, in the place of this one.
    """
    snapshot = read_latest(folder.checkpoints, on_note)
    if snapshot is not None:
        return Earlier(snapshot)
    if folder.is_begun:
        raise FileFormatError(
            what=f"{folder.checkpoints}: no checkpoint that stands here can be used",
            why="each of them was changed since it was written",
            fix="put a whole one back, or start anew with --overwrite",
        )
    on_note("nothing was saved here yet: the run begins at its first step")
    return None


def _listed(config: TrainConfig) -> str:
    return " ".join(map(str, config.data))


def _others(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [
        f"it goes on with {name} {value} instead of {before[name]}"
        for name, value in now.items()
        if before.get(name, value) != value
    ]


def settings(config: TrainConfig) -> dict[str, Any]:
    """For a checkpoint: JSON that makes the same config again."""
    return config.model_dump(mode="json")


def _another(differences: str) -> ConfigError:
    return ConfigError(
        what=f"this is not the run that was begun: {differences}",
        why="going on would be neither that run nor a new one",
        fix="leave these settings and files as they were, or start anew with --overwrite",
    )
